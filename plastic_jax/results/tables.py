"""The results table of a run, and the statistics on it.

The table (`results.parquet`) has one row per trial, stage and evaluation; `summary` reduces it to
one flat dict per arm (`summary.json`). Every comparison is paired by seed: an arm's trial against
the trial of the same seed in its fresh arm.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from plastic_jax.errors import InputError
from plastic_jax.fields import Column

TUNING, CONTINUED = "tuning", "tuning_continued"
FITTED = 0.99  # mean fit_accuracy from which a network counts as fitting its data
MOST_DIVERGED = 0.1  # share of diverged trials above which an arm gets no verdict
LEAST_PAIRS_T, LEAST_PAIRS_BOOTSTRAP = 3, 20
_EPSILON = 1e-9  # a sum or a ratio is rounded: no comparison of epochs or means is closer

_HEAD = {"trial": pa.int32(), "arm": pa.string(), "seed": pa.int32()}
_TAIL = {
    "stage": pa.string(),
    "epoch": pa.float64(),
    "step": pa.int64(),
    "examples_seen": pa.int64(),
    "train_accuracy": pa.float64(),
    "train_loss": pa.float64(),
    "test_accuracy": pa.float64(),
    "test_loss": pa.float64(),
    "validation_accuracy": pa.float64(),
    "validation_loss": pa.float64(),
    "fit_accuracy": pa.float64(),
    "accuracy_reached": pa.bool_(),
    "diverged": pa.bool_(),
}
_OPTIONAL = frozenset({"validation_accuracy", "validation_loss", "accuracy_reached"})
_NULLABLE = frozenset(name for name, kind in _TAIL.items() if kind == pa.float64()) - {"epoch"} | {"accuracy_reached"}


@dataclass(frozen=True)
class Setting:
    """What the statistics need to know of the config.

    `swept`: names of the swept fields. `arms`: in the order of the report, each with `arm` (its
    name) and every swept field's value, None where the field has no effect on the arm. `fresh`: an
    arm's name -> the name of the arm to compare it with; a fresh arm maps to itself.
    `metric_epochs`: an accuracy is the mean over this many last epochs of the tuning stage.
    `equal_updates`: whether fresh trials were trained on, as a control for training time.
    `eval_every`: epochs between a trial's own evaluations. `diagnostics`: what was measured beside accuracy and loss.
    """

    swept: tuple[str, ...]
    arms: tuple[dict[str, Any], ...]
    fresh: dict[str, str]
    metric_epochs: int
    equal_updates: bool
    eval_every: int = 1
    diagnostics: tuple[Column, ...] = ()

    def is_fresh(self, arm: str) -> bool:
        """Whether the arm is one that others are compared with."""
        return self.fresh[arm] == arm


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, fsync, then os.replace."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(
    table: pd.DataFrame, path: str | os.PathLike[str], swept: Sequence[str], diagnostics: Sequence[str] = ()
) -> None:
    """Write the results table so that equal tables give equal bytes, in whatever order they come.

    `table`: one row per (trial, stage, step), columns as in `results.parquet` (those of validation
    and `accuracy_reached` may be missing); `swept` names the swept columns, of integers, floats, strings or bools
    with None, NaN or pandas.NA where a field has no effect; `diagnostics` names further columns of real numbers.
    Integers with gaps should come as dtype
    Int64 or object: pandas has already made floats of them otherwise. Metrics that are not finite
    become null. Raises ValueError where a column is missing, unknown or of mixed types, or where
    two rows are of one evaluation.
    """
    kinds = {**_HEAD, **_TAIL, **dict.fromkeys(diagnostics, pa.float64())}
    names = [*_HEAD, *swept, *(c for c in _TAIL if c in table.columns or c not in _OPTIONAL), *diagnostics]
    if missing := [name for name in names if name not in table.columns]:
        raise ValueError(f"the results table lacks the columns {missing}")
    if unknown := [name for name in table.columns if name not in names]:
        raise ValueError(f"the results table has unknown columns {unknown}; swept are {[*swept]}")
    table = table[names].sort_values(["trial", "stage", "step"], kind="stable")
    if table.duplicated(["trial", "stage", "step"]).any():
        raise ValueError("the results table has two rows of one trial, stage and step")
    nullable = {*_NULLABLE, *swept, *diagnostics}
    arrays = [_array(table[name], kinds.get(name), name, name in nullable) for name in names]
    fields = [pa.field(name, array.type, nullable=name in nullable) for name, array in zip(names, arrays, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(fields)),
        buffer,
        row_group_size=max(len(table), 1),
        compression="zstd",
    )
    replace_file(path, buffer.getvalue())


def _array(column: pd.Series, kind: pa.DataType | None, name: str, nullable: bool) -> pa.Array:
    """One column as an Arrow array; `kind` None: a swept column, typed by its values."""
    null = column.isna().to_numpy()
    if kind is None:
        values = [None if gap else _plain(v) for v, gap in zip(column.tolist(), null, strict=True)]
        kind = _swept_type(column, {type(value) for value in values if value is not None})
        return pa.array(values, type=kind)
    if null.any() and not nullable:
        raise ValueError(f"the results table has nulls in the column {name!r}")
    if kind == pa.float64():
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return pa.array(numbers, mask=~np.isfinite(numbers))
    return pa.array(column.tolist(), type=kind, mask=null)


def _swept_type(column: pd.Series, kinds: set[type]) -> pa.DataType:
    if not kinds:  # nothing but nulls: the dtype, where it says anything
        letter = getattr(column.dtype, "kind", "O")
        return {"i": pa.int64(), "f": pa.float64(), "b": pa.bool_()}.get(letter, pa.string())
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    if kinds == {str}:
        return pa.string()
    raise ValueError(
        f"the swept column {column.name!r} holds {sorted(kind.__name__ for kind in kinds)}; "
        "allowed are integers, floats, strings or bools"
    )


def read(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read `results.parquet`; raises InputError where there is none or it cannot be read.

    Null metrics are NaN. Swept integers and bools come as the nullable dtypes Int64 and boolean.
    """
    try:
        # ParquetFile, because read_table would take a folder named a=b for a partition
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise InputError(f"there is no results table {os.fspath(path)!r}") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(f"{os.fspath(path)!r} is no readable results table: {reason}") from error
    missing = [name for name in [*_HEAD, *_TAIL] if name not in table.column_names and name not in _OPTIONAL]
    if needed := [name for name in missing if name not in _NULLABLE]:
        raise InputError(f"{os.fspath(path)!r} is no results table: it lacks {', '.join(needed)}")
    for name in missing:  # new since it was written
        table = table.append_column(name, pa.nulls(len(table), _TAIL[name]))
    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = table.to_pandas(types_mapper=nullable.get)
    return frame.astype({"step": "int64", "examples_seen": "int64", "diverged": "bool"})


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
    tuning = tuning.assign(epochs=_whole_epochs(tuning), reached=tuning["train_accuracy"] >= accuracy - _EPSILON)
    tuning["before"] = tuning.groupby("trial")["epochs"].shift(fill_value=0.0)
    first = tuning[tuning["reached"]].groupby("trial").head(1)
    never = tuning[~tuning["trial"].isin(first["trial"])].groupby("trial").tail(1)
    never = never.assign(before=never["epochs"])
    found = pd.concat([first, never]).sort_values("trial", ignore_index=True)
    return found[["trial", "arm", "seed", "epochs", "reached", "before"]]


def median_interval(values: np.ndarray) -> list[float] | None:
    """Interval of a median of at least 95 %, from order statistics; None below 6 values.

    It holds for any distribution, and with values censored at a common limit: the interval is then
    censored where it ends there.
    """
    from scipy import stats

    below = int(stats.binom.ppf(0.025, len(values), 0.5))  # P(fewer than this many lie below) <= 2.5 %
    if below < 1:
        return None
    ordered = np.sort(values)
    return [float(ordered[below - 1]), float(ordered[-below])]


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
    return np.floor(rows["epoch"] + _EPSILON)


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


def t_interval(values: np.ndarray) -> list[float] | None:
    """95 % interval of a mean, mean -+ t(0.975, n-1) s / sqrt n; None below 3 values."""
    from scipy import stats  # takes a second to import

    if len(values) < LEAST_PAIRS_T:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def bootstrap_interval(values: np.ndarray) -> list[float] | None:
    """95 % percentile bootstrap interval of a mean, from a fixed generator; None below 20 values.

    Percentile rather than BCa: at few pairs it covers more (85 against 82 % at 5 pairs), and it
    also stands for values that are all equal.
    """
    from scipy import stats

    if len(values) < LEAST_PAIRS_BOOTSTRAP:
        return None
    interval = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


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
    row |= {field: _plain(arm[field]) for field in setting.swept}
    row |= {"trials": len(own), "pairs": 0, "diverged": int(own["diverged"].sum())}
    row["unreached"] = int(own["unreached"].sum())
    measured = ("test_accuracy", "train_accuracy", "validation_accuracy", "fit_accuracy")
    for column in (*measured, *(c.name for c in setting.diagnostics)):
        if column in own:
            row[column] = _plain(own[column].mean())
    row["min_fit_accuracy"] = _plain(own["fit_accuracy"].min())
    row |= dict.fromkeys(("gap", "gap_ci95", "gap_bootstrap_ci95"))
    row |= {"pairs_equal_updates": 0, "gap_equal_updates": None, "gap_equal_updates_ci95": None}
    row["verdict"] = None
    if setting.is_fresh(name):
        return row
    paired = pairs(table, setting, metrics, name)
    gaps = (paired["arm"] - paired["fresh"]).dropna().to_numpy()
    row["pairs"] = len(gaps)
    if len(gaps):
        row["gap"] = _plain(gaps.mean())
        row["gap_ci95"] = t_interval(gaps)
        row["gap_bootstrap_ci95"] = bootstrap_interval(gaps)
        row["verdict"] = _verdict(row["gap_ci95"], own, by_arm[setting.fresh[name]])
    controlled = (paired["arm"] - paired["control"]).dropna().to_numpy()
    row["pairs_equal_updates"] = len(controlled)
    if len(controlled):
        row["gap_equal_updates"] = _plain(controlled.mean())
        row["gap_equal_updates_ci95"] = t_interval(controlled)
    return row


def _verdict(interval: list[float] | None, own: pd.DataFrame, fresh: pd.DataFrame) -> str | None:
    both = (own, fresh)
    if interval is None or any(half["diverged"].mean() > MOST_DIVERGED for half in both):
        return None
    if any(half["fit_accuracy"].mean() < FITTED - _EPSILON for half in both):
        return "not fitted"
    low, high = interval
    return "worse" if high < 0 else "better" if low > 0 else "undecided"


def _plain(value: Any) -> Any:
    """A value as JSON knows it: no numpy scalar, null for NaN and infinities."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value
