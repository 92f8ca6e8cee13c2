"""The table reduced to one flat dict per arm, `summary.json`: every comparison is paired by seed."""

from typing import Any

import pandas as pd

from plastic_jax.errors import InputError
from plastic_jax.results.estimates import bootstrap_interval, t_interval
from plastic_jax.results.pairing import pairs, trial_metrics
from plastic_jax.results.settings import EPSILON, FITTED, MOST_DIVERGED, Setting, plain


def summary(table: pd.DataFrame, setting: Setting) -> list[dict[str, Any]]:
    """One flat, JSON-safe dict per arm, in the setting's order; accuracies and gaps as fractions.

    `trials` counts the finished ones (diverged ones among them), `unreached` those of which a stage
    that was to end by accuracy was ended by its cap. `validation_accuracy` is there where examples
    were held back. `test_accuracy`, `train_accuracy`,
    `fit_accuracy`, `min_fit_accuracy` and the diagnostics are over the trials that did not diverge. `gap` is the
    mean over the `pairs` of metric(arm) - metric(fresh), null for the fresh arm itself, with
    paired t interval `gap_ci95` from 3 pairs and `gap_bootstrap_ci95` from 20 pairs on.
    `gap_equal_updates` is against the fresh arm after as many updates, over the
    `pairs_equal_updates` of which the fresh half was trained on that far; null elsewhere.
    `verdict`: 'worse' (interval below zero), 'better' (above), 'undecided', 'not fitted' (mean
    fit_accuracy of the arm or its fresh arm below 0.99), or None: the fresh arm, fewer than 3
    pairs, or more than a tenth of the trials of either arm diverged.
    """
    known = {arm["arm"] for arm in setting.arms}
    if unknown := sorted(set(table["arm"]) - known):
        raise InputError(f"the results table has an arm {unknown[0]!r} that the config lacks")
    metrics = trial_metrics(table, setting)
    metrics = metrics[metrics["finished"]]
    by_arm = {name: metrics[metrics["arm"] == name] for name in known}
    return [_arm_summary(table, setting, by_arm, metrics, arm) for arm in setting.arms]


def _arm_summary(
    table: pd.DataFrame,
    setting: Setting,
    by_arm: dict[str, pd.DataFrame],
    metrics: pd.DataFrame,
    arm: dict[str, Any],
) -> dict[str, Any]:
    name = arm["arm"]
    own = by_arm[name]
    row: dict[str, Any] = {"arm": name}
    row |= {field: plain(arm[field]) for field in setting.swept}
    row |= {"trials": len(own), "pairs": 0, "diverged": int(own["diverged"].sum())}
    row["unreached"] = int(own["unreached"].sum())
    measured = ("test_accuracy", "train_accuracy", "validation_accuracy", "fit_accuracy")
    for column in (*measured, *(c.name for c in setting.diagnostics)):
        if column in own:
            row[column] = plain(own[column].mean())
    row["min_fit_accuracy"] = plain(own["fit_accuracy"].min())
    row |= dict.fromkeys(("gap", "gap_ci95", "gap_bootstrap_ci95"))
    row |= {"pairs_equal_updates": 0, "gap_equal_updates": None, "gap_equal_updates_ci95": None}
    row["verdict"] = None
    if setting.is_fresh(name):
        return row
    paired = pairs(table, setting, metrics, name)
    gaps = (paired["arm"] - paired["fresh"]).dropna().to_numpy()
    row["pairs"] = len(gaps)
    if len(gaps):
        row["gap"] = plain(gaps.mean())
        row["gap_ci95"] = t_interval(gaps)
        row["gap_bootstrap_ci95"] = bootstrap_interval(gaps)
        row["verdict"] = _verdict(row["gap_ci95"], own, by_arm[setting.fresh[name]])
    controlled = (paired["arm"] - paired["control"]).dropna().to_numpy()
    row["pairs_equal_updates"] = len(controlled)
    if len(controlled):
        row["gap_equal_updates"] = plain(controlled.mean())
        row["gap_equal_updates_ci95"] = t_interval(controlled)
    return row


def _verdict(interval: list[float] | None, own: pd.DataFrame, fresh: pd.DataFrame) -> str | None:
    both = (own, fresh)
    if interval is None or any(half["diverged"].mean() > MOST_DIVERGED for half in both):
        return None
    if any(half["fit_accuracy"].mean() < FITTED - EPSILON for half in both):
        return "not fitted"
    low, high = interval
    return "worse" if high < 0 else "better" if low > 0 else "undecided"
