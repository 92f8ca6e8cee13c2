"""From finished runs to a verdict on each claim; the rules stand in `rules.py`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from plastic_jax.claims.evidence import Evidence
from plastic_jax.claims.measures import Levels, Measured, Sample
from plastic_jax.claims.rules import ALPHA, CLAIMS, POWER, Claim
from plastic_jax.errors import InputError
from plastic_jax.results import inference
from plastic_jax.results.estimates import t_interval
from plastic_jax.results.settings import LEAST_PAIRS_T

REFUTED, SUPPORTED, UNDECIDED, NOT_FITTED = "refuted", "supported", "undecided", "not fitted"
ORDER = (REFUTED, SUPPORTED, UNDECIDED, NOT_FITTED)


@dataclass(frozen=True)
class Row:
    """A claim in one setting, before Holm's correction: its p-values, and `blocked`, the verdict that needs none."""

    claim: Claim
    evidence: Evidence
    levels: Levels
    setting: dict[str, Any]
    measured: Measured
    p_support: float
    p_refute: float
    blocked: str | None
    notes: tuple[str, ...]


def p_values(sample: Sample, bounds: tuple[float, float]) -> tuple[float, float]:
    """Of one effect: the p-value whose rejection says "within the bounds", and the one that says "contrary"."""
    low, high = bounds
    support = inference.p_within(sample.low, sample.high, bounds)
    contrary = inference.p_above(sample.low, high) if math.isinf(low) else inference.p_below(sample.high, low)
    return support, contrary


def weigh(measured: Measured, bounds: tuple[float, float]) -> tuple[float, float]:
    """A row's two p-values: of the test that supports the claim, and of the one that refutes it.

    Support is an intersection-union test over the samples, refutation takes the smallest p-value with Bonferroni's
    correction; both ask for the conditions too.
    """
    each = [p_values(sample, bounds) for sample in measured.samples]
    contrary = [p for _, p in each] + [inference.p_above(step.low, 0.0) for step in measured.steps]
    condition = max((inference.p_below(sample.high, bound) for sample, bound in measured.conditions), default=0.0)
    support = max(condition, *(p for p, _ in each))
    return support, max(condition, min(1.0, len(contrary) * min(contrary)))


def decide(rows: Sequence[tuple[float, float]]) -> list[tuple[str, float, float]]:
    """Verdicts of all rows' (p_support, p_refute), each with the two p-values after Holm's correction over them all."""
    adjusted = iter(inference.holm([p for row in rows for p in row]))
    found = []
    for support, refute in zip(adjusted, adjusted, strict=True):
        verdict = REFUTED if refute <= ALPHA else SUPPORTED if support <= ALPHA else UNDECIDED
        found.append((verdict, support, refute))
    return found


def judge(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """All claims on all runs, JSON-safe: `rows`, refutations first, and `untested`, the claims that no run is about.

    Raises:
      InputError: two runs judge one claim in one setting.
    """
    rows = [row for claim in CLAIMS for one in evidence for row in _rows(claim, one)]
    _check_once(rows)
    given = [(1.0, 1.0) if row.blocked else (row.p_support, row.p_refute) for row in rows]
    made = [_as_dict(row, *decision, len(rows)) for row, decision in zip(rows, decide(given), strict=True)]
    judged = {row["claim"] for row in made}
    return {
        "alpha": ALPHA,
        "rows": sorted(made, key=lambda row: ORDER.index(row["verdict"])),
        "untested": [
            {"claim": c.name, "figure": c.figure, "experiment": c.experiment, "text": c.text}
            for c in CLAIMS
            if c.name not in judged
        ],
    }


def _rows(claim: Claim, evidence: Evidence) -> Iterator[Row]:
    if claim.experiment != evidence.experiment:
        return
    for setting, levels in _groups(claim, evidence):
        measured = claim.measure(evidence, levels)
        blocked, notes = _conditions(claim, evidence, levels, measured)
        p_support, p_refute = weigh(measured, claim.bounds)
        if missing := _missing(claim, levels):
            p_support = 1.0
            notes += (missing,)
        yield Row(claim, evidence, levels, setting, measured, p_support, p_refute, blocked, notes)


def _groups(claim: Claim, evidence: Evidence) -> Iterator[tuple[dict[str, Any], Levels]]:
    """Each combination of the fields that the claim does not speak of, with its arms by level.

    A field without effect on an arm (None) matches every value: one trial serves all (contract 10).
    """
    fresh = evidence.setting.fresh
    levels = {arm: claim.level(v) for arm, v in evidence.values.items() if fresh[arm] != arm}
    levels = {arm: level for arm, level in levels.items() if level is not None}
    fields = [name for name in next(iter(evidence.values.values())) if name not in claim.fields]
    keys = {arm: tuple(evidence.values[arm][name] for name in fields) for arm in levels}
    distinct = dict.fromkeys(keys.values())
    for key in distinct:
        if any(other != key and _serves(key, other) for other in distinct):
            continue
        arms = [arm for arm in levels if _serves(keys[arm], key)]
        if claim.longest:
            most = max(evidence.values[arm]["warm_start_epochs"] for arm in arms)
            arms = [arm for arm in arms if evidence.values[arm]["warm_start_epochs"] == most]
        found = {levels[arm]: arm for arm in arms}
        if not any(level != frozenset() for level in found):
            continue  # nothing but the arm without a reset
        setting = {name: value for name, value in zip(fields, key, strict=True) if value is not None}
        setting["metric_epochs"] = evidence.setting.metric_epochs
        if len(found) >= claim.fewest:
            yield setting, {level: found[level] for level in sorted(found, key=_rank, reverse=claim.falls)}


def _rank(level: Any) -> Any:
    return sorted(level) if isinstance(level, frozenset) else level


def _serves(key: tuple, other: tuple) -> bool:
    return all(mine is None or mine == its for mine, its in zip(key, other, strict=True))


def _missing(claim: Claim, levels: Levels) -> str:
    """Why the levels at hand cannot support the claim; empty where they can."""
    absent = sorted(_text(level) for level in claim.needs - set(levels))
    return "not supported without " + ", ".join(absent) if absent else ""


def _text(level: Any) -> str:
    return "the reset of " + "+".join(map(str, sorted(level))) if isinstance(level, frozenset) else str(level)


def _arms(row_levels: Levels, evidence: Evidence) -> list[str]:
    return list(dict.fromkeys([*row_levels.values(), *(evidence.setting.fresh[a] for a in row_levels.values())]))


def _conditions(claim: Claim, evidence: Evidence, levels: Levels, measured: Measured) -> tuple[str | None, tuple]:
    """The verdict that stands without any test, and why."""
    notes = (measured.note,) if measured.note else ()
    verdicts = {evidence.summary[arm]["verdict"] for arm in levels.values()}
    if min(len(sample.low) for sample in measured.samples) < LEAST_PAIRS_T:
        return UNDECIDED, (*notes, f"fewer than {LEAST_PAIRS_T} pairs")
    if None in verdicts:
        return UNDECIDED, (*notes, "more than a tenth of an arm's trials diverged")
    if claim.needs_fit and NOT_FITTED in verdicts:
        return NOT_FITTED, (*notes, "an arm or its fresh arm does not fit its data")
    for sample, bound in measured.conditions:
        if inference.p_below(sample.high, bound) > ALPHA / 2:
            notes += (f"condition not met: {sample.label} must lie below {100 * bound:g} points",)
    return None, notes


def _check_once(rows: Sequence[Row]) -> None:
    seen: dict[Any, Row] = {}
    for row in rows:
        key = (row.claim.name, *sorted(row.setting.items()))
        other = seen.setdefault(key, row)
        if other is not row and other.evidence is not row.evidence:
            means = [_effect(worst(r), r.claim.unit)[0] for r in (other, row)]
            differ = "the same" if means[0] == means[1] else " and ".join(map(_number, means))
            raise InputError(
                f"{other.evidence.workdir} and {row.evidence.workdir} both judge the claim {row.claim.name!r} in one "
                f"setting and find {differ}: a table takes each setting from one run, so name one of them."
            )


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{100 * value:+.2f}"


def worst(row: Row) -> Sample:
    """The least favourable of the row's samples: the one that is shown."""

    def rank(sample: Sample) -> tuple[float, float]:
        support, refute = p_values(sample, row.claim.bounds)
        return support, -refute

    return max(row.measured.samples, key=rank)


def _effect(sample: Sample, unit: str) -> tuple[float | None, list[float | None] | None]:
    """Mean and 95 % interval; null where censoring leaves it open. A ratio of epochs is given minus 1.

    Between bounds, the mean is that of their middles, and the interval goes from the lower ones' to the upper ones'.
    """

    def shown(value: float) -> float | None:
        return None if not math.isfinite(value) else math.expm1(value) if unit == "ratio" else float(value)

    if not len(sample.low):
        return None, None
    closed = np.isfinite([sample.low, sample.high]).all()
    mean = float((sample.low + sample.high).mean() / 2) if closed else math.nan
    ends = [
        interval[end] if np.isfinite(bound).all() and (interval := t_interval(bound)) else math.nan
        for end, bound in enumerate((sample.low, sample.high))
    ]
    return shown(mean), None if len(sample.low) < LEAST_PAIRS_T else [shown(end) for end in ends]


def _seeds(row: Row, tests: int) -> int | None:
    """Seeds for 80 % power of all of the row's samples together, each test at level 5 % / `tests`."""
    found, share = [], (1 - POWER) / len(row.measured.samples)
    for sample in row.measured.samples:
        if len(sample.low) < LEAST_PAIRS_T or not np.array_equal(sample.low, sample.high):
            return None
        spread, alpha = float(sample.low.std(ddof=1)), ALPHA / tests
        if row.claim.distance:
            power = partial(inference.power_one_sided, distance=row.claim.distance, spread=spread, alpha=alpha)
        else:
            power = partial(inference.power_within, spread=spread, margins=row.claim.bounds, alpha=alpha)
        found.append(inference.seeds_needed(power, 1 - share))
    return None if None in found else max(found)


def _scope(row: Row) -> str:
    """`paper` where every field has a value of the experiment's preset `paper`, and no control's, else `other`."""
    paper = row.evidence.paper
    same = all(value in paper.get(name, (value,)) for name, value in row.setting.items())
    same &= all(row.setting[name] == value for name, value in row.claim.paper.items())
    arms = [row.evidence.values[arm] for arm in row.levels.values()]
    same &= all(arm[n] is None or arm[n] in paper.get(n, (arm[n],)) for arm in arms for n in row.claim.fields)
    if row.claim.longest:
        lengths = {row.evidence.values[arm]["warm_start_epochs"] for arm in row.levels.values()}
        same &= lengths == {max(paper["warm_start_epochs"])}
    return "paper" if same else "other"


def _as_dict(row: Row, verdict: str, p_support: float, p_refute: float, rows: int) -> dict[str, Any]:
    claim, evidence, shown = row.claim, row.evidence, worst(row)
    verdict = row.blocked or verdict
    scope = _scope(row)
    arms = [evidence.summary[arm] for arm in _arms(row.levels, evidence)]
    where = f"{row.setting['model']} on {row.setting['dataset']}"
    owner = "Ash & Adams'" if claim.source == "A&A" else "the paper's"
    mean, interval = _effect(shown, claim.unit)
    control = shown.control[~np.isnan(shown.control)] if shown.control is not None else np.zeros(0)
    fits = [arm["fit_accuracy"] for arm in arms if arm["fit_accuracy"] is not None]
    return {
        "claim": claim.name,
        "figure": claim.figure,
        "source": claim.source,
        "text": claim.text,
        "verdict": verdict,
        "says": f"{verdict} for {where} ({'' if scope == 'paper' else 'not '}{owner} setting)",
        "scope": scope,
        "notes": list(row.notes),
        "experiment": claim.experiment,
        "workdir": evidence.workdir,
        "model": row.setting["model"],
        "dataset": row.setting["dataset"],
        "setting": row.setting,
        "unit": claim.unit,
        "shown": shown.label,
        "effect": mean,
        "effect_ci95": interval,
        "pairs": len(shown.low),
        "diverged": sum(arm["diverged"] for arm in arms),
        "fit": min(fits, default=None),
        "fitted": NOT_FITTED not in {evidence.summary[arm]["verdict"] for arm in row.levels.values()},
        "equal_updates": float(control.mean()) if len(control) else None,
        "equal_updates_ci95": t_interval(control),
        "p_support": row.p_support,
        "p_refute": row.p_refute,
        "p_support_holm": p_support,
        "p_refute_holm": p_refute,
        "seeds_needed": _seeds(row, 2),
        "seeds_needed_in_table": _seeds(row, 2 * rows),
        "parts": [_part(sample, claim) for sample in row.measured.samples],
        "steps": [_part(sample, claim) for sample in row.measured.steps],
        "conditions": [{**_part(s, claim), "below": bound} for s, bound in row.measured.conditions],
    }


def _part(sample: Sample, claim: Claim) -> dict[str, Any]:
    mean, interval = _effect(sample, claim.unit)
    return {"level": sample.label, "pairs": len(sample.low), "effect": mean, "effect_ci95": interval}
