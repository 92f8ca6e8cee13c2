"""What the claims are about, measured: one number a seed, from a run's table."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.claims.evidence import Evidence
from plastic_jax.results import inference

WARM = "warm_start_epochs"
MARGIN = 0.005  # of accuracy: 0.5 points
SPEED_ACCURACY = 0.99


MODULES = 6  # of the networks that figures 6 and 11 speak of


FEW_MODULES = 2  # a "small subset" has at most so many


EARLY = (5, 10)  # pretraining epochs


Values = Mapping[str, Any]


Levels = Mapping[Any, str]  # a claim's levels in order, and their arms


@dataclass(frozen=True)
class Sample:
    """One effect, a number a seed: `low` and `high` [n] bound it, and are equal where nothing is censored.

    `control` [n]: the same against the fresh arm at equal updates, NaN where that was not trained.
    """

    label: str
    low: np.ndarray
    high: np.ndarray
    control: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """What a claim is judged by.

    `samples`: all of them within the claim's bounds support it. `steps`: one of them above 0 refutes it.
    `conditions`: each with the bound that it must lie below, or nothing is decided. `note`: what a reader should know.
    """

    samples: list[Sample]
    steps: list[Sample] = field(default_factory=list)
    conditions: list[tuple[Sample, float]] = field(default_factory=list)
    note: str = ""


def _label(evidence: Evidence, arm: str, fields: tuple[str, ...]) -> str:
    values = {name: evidence.values[arm].get(name) for name in fields}
    return ", ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items() if v is not None)


def _sample(label: str, gaps: pd.DataFrame) -> Sample:
    own = gaps["gap"].to_numpy()
    return Sample(label, own, own, gaps["control"].to_numpy())


def _gap_table(evidence: Evidence, arm: str) -> pd.DataFrame:
    """By seed: `gap`, and `control`, the gap at equal updates."""
    pairs = evidence.pairs(arm)
    return pd.DataFrame({"gap": pairs["arm"] - pairs["fresh"], "control": pairs["arm"] - pairs["control"]})


def gaps(*fields: str) -> Callable[[Evidence, Levels], Measured]:
    """A gap for each level."""

    def measure(evidence: Evidence, levels: Levels) -> Measured:
        return Measured([_sample(_label(evidence, a, fields), _gap_table(evidence, a)) for a in levels.values()])

    return measure


def early(evidence: Evidence, levels: Levels) -> Measured:
    """The gap after the longest early pretraining, on condition that this had not fitted its own data."""
    latest = max(levels)
    arm = levels[latest]
    measured = gaps(WARM)(evidence, {latest: arm})
    short = (evidence.fits(arm, "pretraining").reindex(evidence.pairs(arm).index) - 1).to_numpy()
    condition = Sample("train accuracy at the end of pretraining, minus 100 %", short, short)
    return Measured(measured.samples, conditions=[(condition, -MARGIN)])


def fits(evidence: Evidence, levels: Levels) -> Measured:
    """What the arm and its fresh arm lack to 100 % train accuracy."""
    (arm,) = levels.values()
    seeds, fresh = evidence.pairs(arm).index, evidence.setting.fresh[arm]
    short = {label: (evidence.fits(a).reindex(seeds) - 1).to_numpy() for label, a in (("warm", arm), ("fresh", fresh))}
    return Measured([Sample(label, values, values) for label, values in short.items()])


def trend(name: str, *, from_fresh: bool) -> Callable[[Evidence, Levels], Measured]:
    """The trend of the gap over the levels, and its steps; `from_fresh`: the fresh arm, of gap 0, is the first."""

    def measure(evidence: Evidence, levels: Levels) -> Measured:
        tables = {str(level): _gap_table(evidence, arm) for level, arm in levels.items()}
        if from_fresh:
            first = next(iter(tables.values()))
            tables = {"0": pd.DataFrame(0.0, first.index, first.columns), **tables}
        names = list(tables)
        joined = pd.concat(tables, axis=1, join="inner")
        gaps, controls = (joined.xs(k, axis=1, level=1)[names].to_numpy() for k in ("gap", "control"))
        whole = inference.trend(gaps)
        steps = [
            Sample(f"{name}={a} to {b}", gaps[:, k + 1] - gaps[:, k], gaps[:, k + 1] - gaps[:, k])
            for k, (a, b) in enumerate(itertools.pairwise(names))
        ]
        label = f"{name}={', '.join(names)}"
        return Measured([Sample(label, whole, whole, inference.trend(controls))], steps)

    return measure


def recovery(evidence: Evidence, levels: Levels) -> Measured:
    """The gap that is left after each reset, on condition that there is one without."""
    measured = gaps("reset")(evidence, {level: arm for level, arm in levels.items() if level})
    if frozenset() not in levels:
        empty = Sample("gap without a reset", np.zeros(0), np.zeros(0))
        return Measured(measured.samples, conditions=[(empty, -MARGIN)], note="no arm without a reset")
    plain = _sample("gap without a reset", _gap_table(evidence, levels[frozenset()]))
    return Measured(measured.samples, conditions=[(plain, -MARGIN)])


def halved(evidence: Evidence, levels: Levels) -> Measured:
    """The gap at x10 minus half of that at x1, on condition that there is one at x1."""
    slow, fast = (_gap_table(evidence, levels[level]) for level in (1, 10))
    left = (fast - slow / 2).dropna(subset="gap")
    return Measured(
        [_sample("gap at x10 - gap at x1 / 2", left)],
        conditions=[(_sample("gap at x1", slow.loc[left.index]), 0.0)],
    )


def speed(evidence: Evidence, levels: Levels) -> Measured:
    """The logarithm of the ratio of epochs to 99 % train accuracy, arm to fresh, as bounds where it is censored."""
    samples, never, between = [], 0, 0.0
    for arm in levels.values():
        seeds = evidence.pairs(arm).index
        fresh, own = (evidence.epochs_to(one, SPEED_ACCURACY).loc[seeds] for one in (evidence.setting.fresh[arm], arm))
        low, high = np.log(own["low"]) - np.log(fresh["high"]), np.log(own["high"]) - np.log(fresh["low"])
        samples.append(Sample(_label(evidence, arm, ("reset",)), low.to_numpy(), high.to_numpy()))
        for half in (own, fresh):
            seen = np.isfinite(half["high"])
            never += int((~seen).sum())
            between = max(between, (half["high"] - half["low"])[seen].max())
    notes = [f"{never} trials never saw 99 % train accuracy"] if never else []
    if between > 0:
        notes.append(f"epochs are known to {between + 1:g}, between two evaluations: --config.eval_every=1 tells them")
    return Measured(samples, note="; ".join(notes))
