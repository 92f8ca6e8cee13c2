"""From the table to one number a trial, and to pairs of trials of one seed."""

import math

import numpy as np
import pandas as pd

from plastic_jax.errors import InputError
from plastic_jax.results.settings import CONTINUED, EPSILON, TUNING, Setting


def trial_metrics(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """One row per trial, sorted by trial.

    `trial`, `arm`, `seed`; `test_accuracy`, `train_accuracy` and, where examples were held back,
    `validation_accuracy`, and the diagnostics, means over the rows of the tuning stage whose whole epochs are above the
    last one's minus metric_epochs (the paper: the last 100); `fit_accuracy`, from the tuning
    stage's end; `steps`, updates over all stages up to there; `finished`: the tuning stage has
    ended (its last row has a fit_accuracy) or the trial diverged; `diverged`: in any stage but the
    equal-updates control; `unreached`: a stage that was to end by accuracy was ended by its cap.
    Accuracies are fractions, NaN unless the trial is finished and has not diverged.
    """
    tuning = table[table["stage"] == TUNING].sort_values(["trial", "step"])
    whole = _whole_epochs(tuning)
    last = whole.groupby(tuning["trial"]).transform("max")
    window = tuning[whole > last - setting.metric_epochs]
    measured = ("test_accuracy", "train_accuracy", "validation_accuracy", *(c.name for c in setting.diagnostics))
    accuracies = [name for name in measured if name in table]
    means = window.groupby("trial")[accuracies].mean()
    ends = tuning.groupby("trial").tail(1).set_index("trial")
    own = table[table["stage"] != CONTINUED]
    metrics = table.groupby("trial")[["arm", "seed"]].first().join(means)
    if (twice := metrics.duplicated(["arm", "seed"])).any():
        arm, seed = metrics.loc[twice, ["arm", "seed"]].iloc[0]
        raise InputError(f"the results table has two trials of arm {arm!r} and seed {seed}")
    metrics["fit_accuracy"] = ends["fit_accuracy"].reindex(metrics.index)
    metrics["steps"] = ends["step"].reindex(metrics.index).astype("Int64")
    diverged = own.groupby("trial")["diverged"].any().reindex(metrics.index, fill_value=False)
    metrics["finished"] = diverged | metrics["fit_accuracy"].notna()
    metrics["diverged"] = diverged
    metrics["unreached"] = False
    if "accuracy_reached" in table:
        missed = own["accuracy_reached"].eq(False).fillna(False).astype(bool)
        metrics["unreached"] = missed.groupby(own["trial"]).any().reindex(metrics.index, fill_value=False)
    metrics.loc[diverged | ~metrics["finished"], [*accuracies, "fit_accuracy"]] = np.nan
    return metrics.reset_index()


def epochs_to_accuracy(table: pd.DataFrame, accuracy: float) -> pd.DataFrame:
    """Training speed: one row per trial that did not diverge, sorted by trial (the paper's figure 11).

    `trial`, `arm`, `seed`; `epochs` of the tuning stage until an epoch's train accuracy was first
    seen to be at least `accuracy`, or all of its epochs; `reached`: whether it was (else the number
    is censored); `before`: the evaluated epoch before that one, or all of its epochs. So the epoch
    asked for lies in `before` + 1 .. `epochs`, or beyond `before`.
    """
    tuning = table[table["stage"] == TUNING].sort_values(["trial", "step"])
    diverged = set(table.loc[table["diverged"] & (table["stage"] != CONTINUED), "trial"])
    tuning = tuning[~tuning["trial"].isin(diverged)]
    tuning = tuning.assign(epochs=_whole_epochs(tuning), reached=tuning["train_accuracy"] >= accuracy - EPSILON)
    tuning["before"] = tuning.groupby("trial")["epochs"].shift(fill_value=0.0)
    first = tuning[tuning["reached"]].groupby("trial").head(1)
    never = tuning[~tuning["trial"].isin(first["trial"])].groupby("trial").tail(1)
    never = never.assign(before=never["epochs"])
    found = pd.concat([first, never]).sort_values("trial", ignore_index=True)
    return found[["trial", "arm", "seed", "epochs", "reached", "before"]]


def pairs(table: pd.DataFrame, setting: Setting, metrics: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The pairs of an arm and its fresh arm: one row per seed of which both halves are sound.

    `metrics` is `trial_metrics(table, setting)`. Index: seed, ascending. Columns, all mean test
    accuracies as fractions: `arm`; `fresh`, the fresh trial after the same tuning budget;
    `control`, the fresh trial after as many updates as the arm's (NaN where it did not get there).
    """
    sound = metrics[metrics["finished"] & ~metrics["diverged"]]
    own = sound[sound["arm"] == arm].set_index("seed")
    fresh = sound[sound["arm"] == setting.fresh[arm]].set_index("seed")
    seeds = own.index.intersection(fresh.index).sort_values()
    own, fresh = own.loc[seeds], fresh.loc[seeds]
    control = np.full(len(seeds), np.nan)
    if setting.equal_updates:
        rows = table[table["trial"].isin(fresh["trial"]) & table["stage"].isin([TUNING, CONTINUED])]
        by_trial = dict(list(rows.sort_values(["trial", "step"]).groupby("trial")))
        control[:] = [
            _control(by_trial[trial], int(updates), setting.metric_epochs, setting.eval_every)
            for trial, updates in zip(fresh["trial"], own["steps"], strict=True)
        ]
    columns = {"arm": own["test_accuracy"], "fresh": fresh["test_accuracy"], "control": control}
    return pd.DataFrame(columns, index=seeds)


def _whole_epochs(rows: pd.DataFrame) -> pd.Series:
    """The epoch that an evaluation ends: its batch may reach into the next one."""
    return np.floor(rows["epoch"] + EPSILON)


def _control(rows: pd.DataFrame, updates: int, metric_epochs: int, eval_every: int) -> float:
    """Mean test accuracy of a fresh trial over the last epochs up to `updates` steps.

    `rows`: of its tuning stage and of the training beyond it, by step. NaN where it diverged before
    that many updates, or ended more than one evaluation interval short of them.
    """
    steps = rows["step"].to_numpy()
    reached = rows[steps <= updates]
    if reached.empty or reached["diverged"].any():
        return math.nan
    interval = np.diff(steps).max() if len(steps) > 1 else steps[0]
    if updates - steps[-1] >= interval:
        return math.nan
    whole = _whole_epochs(reached)
    # Not the ends of other arms' controls: an arm's figure is the same whatever else is in the sweep.
    own = (whole % eval_every == 0) | (whole == whole.max()) | (reached["stage"] == TUNING)
    window = (whole > whole.max() - metric_epochs) & own
    return float(reached["test_accuracy"][window].mean())
