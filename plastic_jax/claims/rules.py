"""The paper's claims as data, and the rules by which a finished run supports or refutes them.

Written down before the runs, and kept in claims.json beside the verdicts.

**What is judged.** Each claim within each combination of the fields that it does not speak of (data set, model, label
noise, ...): one row each. Every quantity is one number a seed: a *gap* is an arm's test accuracy minus its fresh
arm's, of the same seed. Trials that diverged leave the pairs. Where a claim leaves the number of pretraining epochs
open, it is judged at the run's largest one. Tests are t tests over seeds, each with 95 % intervals.

**What supports and what refutes** a claim, by its kind. One-sided tests at 2.5 %, which says the same as the 95 %
interval:

- *Superiority* ("below", "a gap", "not zero"). Supported: the interval lies below the threshold, 0. Refuted: it lies
  above. A small gap is not refuted by being small, only by being of the other sign.
- *Equivalence* ("recovers", "no gain in speed", "both at 100 %"). Supported: the interval lies within the margins (two
  one-sided tests), 0.5 points of accuracy or a factor of 0.9 to 1.1 of the epochs. Refuted: it lies wholly outside, on
  the side that contradicts the claim (below the fresh accuracy, below 100 %, faster). Outside on the other side:
  undecided.
- *"Do not recover"* is the complement: supported where the interval lies below -0.5 points, refuted where above.
- *"At every"*: several of the above at once (intersection-union). Supported: each is, on its own. Refuted: one is, with
  Bonferroni's correction for there being several. Shown is the least favourable one.
- *"Monotone"*: the linear trend over the ordered levels, per seed. Supported: the trend's interval lies below 0.
  Refuted: it lies above 0, or a step between two neighbouring levels goes the other way (Bonferroni over the trend and
  all steps). The second wins where both hold.
- *"Much smaller"*: at least half of the gap is gone. The gap at x10 minus half of that at x1, paired by seed, lies
  above 0 (supported) or below (refuted).

**Conditions.** Neither verdict without them. Every arm's mean fit is at least 99 %, else *not fitted* (but for the
claim about fit itself); at least 3 pairs, and at most a tenth of an arm's trials diverged. *Recovery* and *much
smaller* take for granted that there is a gap to recover from: without a reset below -0.5 points, at x1 below 0. The
*early* gap takes for granted that pretraining ended below 99.5 % train accuracy. These are tested at the same level,
within the row. A claim that names its levels (all four optimisers, the head alone, the last 4 and the last 5 modules)
is not supported without them. A trend of fewer than three levels (the fresh arm is one, at 0 stages) and an "at every"
of fewer than two are not judged.

**What the paper leaves open**, and is fixed here: "small subsets" are one or two of the six modules, and networks with
another number of modules are not judged on figures 6 and 11; "5-10 epochs" is the longest pretraining from 5 to 10;
epochs are compared by their ratio, a geometric mean over seeds; levels of a trend count as equally spaced; figures 1
and 2 are about Adam, figure 4 left about r = 1.

**Several rows.** Each row has two p-values, one of the test whose rejection supports it and one of the test whose
rejection refutes it. Holm's correction runs over both p-values of all rows of the table; rows that cannot be judged
count with p = 1. A verdict takes an adjusted p-value of at most 0.05. So the probability of any false verdict in the
table is at most 5 %, as far as t tests hold. Intervals are not adjusted: beside "undecided" one may exclude 0.

**Beside the verdict**, and no part of it: the same effect against the fresh arm at equal updates.

**Censored epochs** (figure 11): a trial that never saw 99 % train accuracy counts with bounds: its epochs are more than
those trained. So does one that is not evaluated every epoch: it got there after the evaluation before the one that saw
it. Each test takes the bound that makes a rejection harder, so that coarse epochs decide nothing by themselves.

**Seeds needed**: for 80 % power of this row's tests together, with the measured spread, conditions left out. For a gap
the size is 1.3 points, the smaller of the two sizes known for Adam (paper: figure 1). Trends: 1.3 points from the first
level to the last. Not recovering: 1.3 points, 0.8 beyond the margin. Much smaller, not zero: a gap of 1.3 of which a
quarter is left, 0.325 points beyond either threshold. Equivalence: no difference at all, and the margins above.
`seeds_needed` is for a table of this row alone, `seeds_needed_in_table` for the first step of this table's correction.

**Scope.** A verdict is about its own model and data set. It is about the paper's setting (`scope` "paper") only where
every field, the claim's own levels too, has a value of the experiment's preset `paper`, and none a control's, such as a
falling learning rate. No MLP refutes a claim about a ResNet.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.claims.evidence import Evidence
from plastic_jax.results import inference
from plastic_jax.study.config import reset_modules

ALPHA = 0.05  # of the whole table
MARGIN = 0.005  # of accuracy: 0.5 points
SPEED_MARGINS = (float(np.log(0.9)), float(np.log(1.1)))  # of the logarithm of the ratio of epochs
SPEED_ACCURACY = 0.99
POWER = 0.8
GAP = 0.013  # the reference: ReScience 2021, ResNet-18 on CIFAR-10 with Adam, 80.3 -> 79.0
LEFT = 0.25  # share of it that is left at x10, for the number of seeds
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
    `conditions`: each with the bound that it must lie below, or nothing is decided. `note`: what is to be known.
    """

    samples: list[Sample]
    steps: list[Sample] = field(default_factory=list)
    conditions: list[tuple[Sample, float]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    `level`: of an arm's values, the level of the claim that it is, or None for no part of it. `fields`: those that the
    claim speaks of; it is judged within each combination of the others. `bounds`: of the effect's mean, in its unit;
    `distance`: between the size expected and the finite bound (for the number of seeds; 0: no effect expected).
    `needs`: levels without which it is not supported; with fewer levels than `fewest` it is not judged. `longest`:
    only arms with the most pretraining epochs count. `falls`: levels in descending order. `paper`: the paper's own
    value of a field of which the preset holds controls too.
    """

    name: str
    figure: str
    experiment: str
    text: str
    fields: tuple[str, ...]
    level: Callable[[Values], Any]
    measure: Callable[[Evidence, Levels], Measured]
    bounds: tuple[float, float] = (-np.inf, 0.0)
    distance: float = GAP
    needs: frozenset[Any] = frozenset()
    fewest: int = 1
    longest: bool = False
    falls: bool = False
    needs_fit: bool = True
    unit: str = "points"
    source: str = "paper"
    paper: Mapping[str, Any] = field(default_factory=dict)


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


def _gaps(*fields: str) -> Callable[[Evidence, Levels], Measured]:
    """A gap for each level."""

    def measure(evidence: Evidence, levels: Levels) -> Measured:
        return Measured([_sample(_label(evidence, a, fields), _gap_table(evidence, a)) for a in levels.values()])

    return measure


def _early(evidence: Evidence, levels: Levels) -> Measured:
    """The gap after the longest early pretraining, on condition that this had not fitted its own data."""
    latest = max(levels)
    arm = levels[latest]
    measured = _gaps(WARM)(evidence, {latest: arm})
    short = (evidence.fits(arm, "pretraining").reindex(evidence.pairs(arm).index) - 1).to_numpy()
    condition = Sample("train accuracy at the end of pretraining, minus 100 %", short, short)
    return Measured(measured.samples, conditions=[(condition, -MARGIN)])


def _fits(evidence: Evidence, levels: Levels) -> Measured:
    """What the arm and its fresh arm lack to 100 % train accuracy."""
    (arm,) = levels.values()
    seeds, fresh = evidence.pairs(arm).index, evidence.setting.fresh[arm]
    short = {label: (evidence.fits(a).reindex(seeds) - 1).to_numpy() for label, a in (("warm", arm), ("fresh", fresh))}
    return Measured([Sample(label, values, values) for label, values in short.items()])


def _trend(name: str, *, from_fresh: bool) -> Callable[[Evidence, Levels], Measured]:
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


def _recovery(evidence: Evidence, levels: Levels) -> Measured:
    """The gap that is left after each reset, on condition that there is one without."""
    measured = _gaps("reset")(evidence, {level: arm for level, arm in levels.items() if level})
    if frozenset() not in levels:
        empty = Sample("gap without a reset", np.zeros(0), np.zeros(0))
        return Measured(measured.samples, conditions=[(empty, -MARGIN)], note="no arm without a reset")
    plain = _sample("gap without a reset", _gap_table(evidence, levels[frozenset()]))
    return Measured(measured.samples, conditions=[(plain, -MARGIN)])


def _halved(evidence: Evidence, levels: Levels) -> Measured:
    """The gap at x10 minus half of that at x1, on condition that there is one at x1."""
    slow, fast = (_gap_table(evidence, levels[level]) for level in (1, 10))
    left = (fast - slow / 2).dropna(subset="gap")
    return Measured(
        [_sample("gap at x10 - gap at x1 / 2", left)],
        conditions=[(_sample("gap at x1", slow.loc[left.index]), 0.0)],
    )


def _speed(evidence: Evidence, levels: Levels) -> Measured:
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


def _has_six(values: Values) -> bool:
    return values["model"] == "resnet" or values["depth"] + 1 == MODULES


def _reset_level(wanted: Callable[[frozenset[int]], bool]) -> Callable[[Values], frozenset[int] | None]:
    def level(values: Values) -> frozenset[int] | None:
        found = frozenset(reset_modules(values["reset"] or "none"))
        return found if _has_six(values) and wanted(found) else None

    return level


def _rate(*factors: float) -> Callable[[Values], float | None]:
    def level(values: Values) -> float | None:
        factor = values["tuning_learning_rate_factor"]
        return factor if values[WARM] and factor in factors else None

    return level


WARM = "warm_start_epochs"
LAST = frozenset({frozenset({3, 4, 5, 6}), frozenset({2, 3, 4, 5, 6})})  # the last 4, and the last 5

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="warm-below-fresh",
        figure="1",
        experiment="warm_start",
        text="pretrained below fresh",
        fields=(WARM, "optimizer"),
        level=lambda v: (v[WARM] or None) if v["optimizer"] == "adam" else None,
        measure=_gaps(WARM),
        longest=True,
    ),
    Claim(
        name="both-fit",
        figure="1",
        experiment="warm_start",
        text="pretrained and fresh both at 100 % train accuracy",
        fields=(WARM, "optimizer"),
        level=lambda v: (v[WARM] or None) if v["optimizer"] == "adam" else None,
        measure=_fits,
        bounds=(-MARGIN, MARGIN),
        distance=0.0,
        longest=True,
        needs_fit=False,
    ),
    Claim(
        name="early-gap",
        figure="2",
        experiment="warm_start",
        text="a gap already after 5-10 epochs with Adam, before train accuracy is 100 %",
        fields=(WARM, "optimizer"),
        level=lambda v: v[WARM] if v["optimizer"] == "adam" and EARLY[0] <= (v[WARM] or 0) <= EARLY[1] else None,
        measure=_early,
    ),
    Claim(
        name="every-optimiser",
        figure="2, 8-10",
        experiment="warm_start",
        text="pretrained below fresh with each of the four optimisers",
        fields=(WARM, "optimizer"),
        level=lambda v: v["optimizer"] if v[WARM] else None,
        measure=_gaps("optimizer", WARM),
        fewest=2,
        needs=frozenset({"adam", "rmsprop", "sgd", "momentum"}),
        longest=True,
    ),
    Claim(
        name="every-gamma",
        figure="3",
        experiment="smooth_transition",
        text="a gap for every gamma of a smooth transition",
        fields=("gamma", "transition", WARM),
        level=lambda v: v["gamma"] if v["transition"] == "smooth" and v["gamma"] else None,
        measure=_gaps("gamma"),
        fewest=2,
    ),
    Claim(
        name="falls-with-stages",
        figure="4 left",
        experiment="multi_stage",
        text="test accuracy falls monotonically with the number of pretraining stages",
        fields=("pretraining_stages", "uniform_fraction"),
        level=lambda v: v["pretraining_stages"] or None if v.get("uniform_fraction") in (None, 1.0) else None,
        measure=_trend("pretraining_stages", from_fresh=True),
        fewest=2,
    ),
    Claim(
        name="imbalance-widens",
        figure="4 right",
        experiment="multi_stage",
        text="the smaller the uniform fraction r, the larger the gap",
        fields=("uniform_fraction",),
        level=lambda v: v.get("uniform_fraction") if v["pretraining_stages"] else None,
        measure=_trend("uniform_fraction", from_fresh=False),
        fewest=3,
        falls=True,
    ),
    Claim(
        name="every-size",
        figure="5",
        experiment="capacity",
        text="a gap at every depth and width",
        fields=("depth", "width", WARM),
        level=lambda v: (v["depth"], v["width"]) if v[WARM] else None,
        measure=_gaps("depth", "width"),
        fewest=2,
        longest=True,
    ),
    Claim(
        name="late-reset-recovers",
        figure="6",
        experiment="module_reset",
        text="resetting the last 4 or 5 of 6 modules recovers the fresh accuracy",
        fields=("reset", WARM),
        level=_reset_level(lambda m: not m or m in LAST),
        measure=_recovery,
        bounds=(-MARGIN, MARGIN),
        distance=0.0,
        needs=LAST,
        longest=True,
    ),
    Claim(
        name="small-resets-do-not",
        figure="6",
        experiment="module_reset",
        text="resetting one or two modules, the head alone included, does not recover it",
        fields=("reset", WARM),
        level=_reset_level(lambda m: len(m) <= FEW_MODULES),
        measure=_recovery,
        bounds=(-np.inf, -MARGIN),
        distance=GAP - MARGIN,
        needs=frozenset({frozenset({MODULES})}),
        longest=True,
    ),
    Claim(
        name="faster-tuning-shrinks",
        figure="7",
        experiment="tuning_learning_rate",
        text="a 10 times larger tuning learning rate makes the gap much smaller",
        fields=("tuning_learning_rate_factor", WARM),
        level=lambda v: (
            v["tuning_learning_rate_factor"] if v["tuning_learning_rate_factor"] in (1, 10) and v[WARM] else None
        ),
        measure=_halved,
        bounds=(0.0, np.inf),
        distance=GAP * (0.5 - LEFT),
        fewest=2,
        longest=True,
        paper={"schedule": "constant"},
    ),
    Claim(
        name="faster-tuning-leaves-a-gap",
        figure="7",
        experiment="tuning_learning_rate",
        text="a 10 times larger tuning learning rate does not make the gap zero",
        fields=("tuning_learning_rate_factor", WARM),
        level=lambda v: (
            v["tuning_learning_rate_factor"] if v["tuning_learning_rate_factor"] == 10 and v[WARM] else None
        ),
        measure=_gaps("tuning_learning_rate_factor"),
        distance=GAP * LEFT,
        longest=True,
        paper={"schedule": "constant"},
    ),
    Claim(
        name="no-gain-in-speed",
        figure="11",
        experiment="module_reset",
        text="keeping modules 1 or 1-2 and resetting the rest gains no speed to 99 % train accuracy",
        fields=("reset", WARM),
        level=_reset_level(lambda m: m in LAST),
        measure=_speed,
        bounds=SPEED_MARGINS,
        distance=0.0,
        longest=True,
        unit="ratio",
    ),
    Claim(
        name="online-warm-below-fresh",
        figure="A&A",
        experiment="online",
        text="online, warm below fresh",
        fields=("intervention",),
        level=lambda v: "none" if v["intervention"] in (None, "none") else None,
        measure=_gaps("intervention"),
        source="A&A",
    ),
)
"""The rows "expected" of the paper's figures, and Ash & Adams' online setting."""
