"""The results table and the statistics on it, against closed forms, scipy and hand-made cases."""

import dataclasses
import json
import math
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats
from synthetic import TRAIN_EXAMPLES, pair_table, rows, two_arms

from plastic_jax import files
from plastic_jax.errors import InputError
from plastic_jax.results import estimates, pairing, summaries, tables
from plastic_jax.results.settings import Setting

HALF = TRAIN_EXAMPLES // 2


def mixed_table() -> pd.DataFrame:
    """Swept columns of all four kinds, each with a null but the bool; a diverged trial."""
    fresh = {"arm": "fresh", "length": None, "rate": None, "optimizer": None, "reset": True}
    warm = {"arm": "warm", "length": 7, "rate": 1.0, "optimizer": "adam", "reset": False}
    made = rows(0, fresh, 3, "tuning", [1, 2], [0.5, 0.6])
    made += rows(1, warm, 3, "pretraining", [1, 2], [0.4, 0.45], size=HALF)
    made += rows(1, warm, 3, "tuning", [1, 2], [0.5, 0.0], start=TRAIN_EXAMPLES, diverged=True)
    return pd.DataFrame(made, dtype=object)


MIXED = ("length", "rate", "optimizer", "reset")


def only(table: pd.DataFrame, setting: Setting, arm: str = "warm") -> dict:
    return next(row for row in summaries.summary(table, setting) if row["arm"] == arm)


# The file


def test_round_trip_keeps_values_types_and_nulls(tmp_path):
    path = tmp_path / "seed=4" / "results.parquet"  # a folder that looks like a partition
    tables.write(mixed_table(), path, MIXED)
    table = tables.read(path)
    assert list(table.columns) == [
        *("trial", "arm", "seed", *MIXED, "stage", "epoch", "step", "examples_seen"),
        *("train_accuracy", "train_loss", "test_accuracy", "test_loss", "fit_accuracy", "diverged"),
    ]
    types = table.dtypes.astype(str)
    assert types[["trial", "seed"]].tolist() == ["int32", "int32"]
    assert types[["length", "rate", "reset"]].tolist() == ["Int64", "float64", "boolean"]
    assert types[["epoch", "step", "examples_seen"]].tolist() == ["float64", "int64", "int64"]
    assert types["diverged"] == "bool"
    assert table["length"].isna().tolist() == [True, True, False, False, False, False]
    assert table.loc[2:, "length"].tolist() == [7, 7, 7, 7]
    assert table.loc[2, "optimizer"] == "adam" and table["optimizer"].isna().sum() == 2
    assert table["stage"].tolist() == ["tuning"] * 2 + ["pretraining"] * 2 + ["tuning"] * 2
    assert table["step"].tolist() == [10, 20, 5, 10, 20, 30]
    assert table["diverged"].tolist() == [False] * 5 + [True]
    assert math.isnan(table["test_accuracy"].iloc[-1])


def test_equal_tables_give_equal_bytes(tmp_path):
    table = mixed_table()
    tables.write(table, tmp_path / "a", MIXED)
    expected = (tmp_path / "a").read_bytes()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(table))
        shuffled = table.iloc[order][list(reversed(table.columns))]
        tables.write(shuffled, tmp_path / "b", MIXED)
        assert (tmp_path / "b").read_bytes() == expected
    tables.write(tables.read(tmp_path / "a"), tmp_path / "c", MIXED)
    assert (tmp_path / "c").read_bytes() == expected
    table.loc[0, "test_accuracy"] += 1e-9
    tables.write(table, tmp_path / "d", MIXED)
    assert (tmp_path / "d").read_bytes() != expected


def test_file_has_nulls_for_what_is_not_finite_and_nothing_of_pandas(tmp_path):
    table = mixed_table()
    table["test_loss"] = [math.inf, math.nan, None, -math.inf, 1.0, None]
    tables.write(table, tmp_path / "t", MIXED)
    with pq.ParquetFile(tmp_path / "t") as file:
        stored = file.read()
        assert file.num_row_groups == 1
    assert stored["test_loss"].to_pylist() == [None, None, None, None, 1.0, None]
    assert stored["fit_accuracy"].to_pylist() == [None, 1.0, None, 1.0, None, None]
    assert stored["length"].to_pylist() == [None, None, 7, 7, 7, 7]
    assert stored.schema.metadata is None
    assert not stored.schema.field("step").nullable and stored.schema.field("rate").nullable


def test_validation_columns_and_an_empty_table_are_kept(tmp_path):
    table = mixed_table().assign(validation_accuracy=0.5, validation_loss=None)
    tables.write(table, tmp_path / "t", MIXED)
    assert tables.read(tmp_path / "t")["validation_accuracy"].tolist() == [0.5] * 6
    tables.write(table.iloc[:0], tmp_path / "t", MIXED)
    assert tables.read(tmp_path / "t").empty


@pytest.mark.parametrize(
    ("change", "swept", "message"),
    [
        (lambda t: t.drop(columns="step"), MIXED, "lacks the columns .'step'"),
        (lambda t: t, MIXED[1:], "unknown columns .'length'"),
        (lambda t: pd.concat([t, t.iloc[:1]]), MIXED, "two rows of one trial"),
        (lambda t: t.assign(step=[None, 1, 2, 3, 4, 5]), MIXED, "nulls in the column 'step'"),
        (lambda t: t.assign(length=["a", 1, 2, 3, 4, 5]), MIXED, "'length' holds .'int', 'str'"),
    ],
)
def test_write_refuses_a_wrong_table(tmp_path, change, swept, message):
    with pytest.raises(ValueError, match=message):
        tables.write(change(mixed_table()), tmp_path / "t", swept)
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "t"
    files.replace_file(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_read_says_in_one_sentence_what_is_wrong(tmp_path):
    path = tmp_path / "results.parquet"
    with pytest.raises(InputError, match="there is no results table"):
        tables.read(path)
    tables.write(mixed_table(), path, MIXED)
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"x" * 100,
        whole[:4] + b"x" * 200 + whole[204:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is no readable results table") as caught:
            tables.read(path)
        assert "\n" not in str(caught.value)
    pd.DataFrame({"arm": ["a"]}).to_parquet(path)
    with pytest.raises(InputError, match="lacks trial, seed"):
        tables.read(path)


# A trial's metric


def test_metric_is_the_mean_over_the_last_epochs_of_tuning():
    arm = two_arms().arms[1]
    made = rows(5, arm, 2, "pretraining", [4], [0.9], size=HALF)
    made += rows(5, arm, 2, "tuning", [3, 6, 9, 10], [0.1, 0.2, 0.4, 0.7], start=4 * HALF, fit=0.995)
    made += rows(5, arm, 2, "tuning_continued", [13], [0.99], start=4 * HALF)
    table = pd.DataFrame(made)
    for metric_epochs, expected in ((1, 0.7), (4, 0.55), (5, (0.2 + 0.4 + 0.7) / 3), (99, 0.35)):
        (row,) = pairing.trial_metrics(table, two_arms(metric_epochs)).to_dict("records")
        assert row["test_accuracy"] == pytest.approx(expected, abs=1e-15)
    assert row["arm"] == "warm" and row["seed"] == 2 and row["trial"] == 5
    assert row["fit_accuracy"] == 0.995 and row["steps"] == 20 + 100
    assert row["finished"] and not row["diverged"]


def test_metric_window_forgives_rounded_epochs():
    # 0.1 + 0.2 > 0.3 in floats; (last - metric_epochs) is meant to be excluded
    made = rows(0, two_arms().arms[0], 0, "tuning", [1, 2, 3], [0.0, 0.4, 0.6])
    table = pd.DataFrame(made)
    table["epoch"] = [1.0 + 1e-12, 2.0, 3.0]
    assert pairing.trial_metrics(table, two_arms(2))["test_accuracy"].tolist() == [0.5]


def test_diverged_and_unfinished_trials_have_no_metric():
    fresh, warm = two_arms().arms
    made = rows(0, fresh, 0, "tuning", [1, 2], [0.5, 0.6], fit=None)  # interrupted
    made += rows(1, warm, 0, "pretraining", [1], [0.5])  # not yet tuned
    made += rows(2, fresh, 1, "tuning", [1, 2], [0.5, 0.0], diverged=True)
    made += rows(3, warm, 1, "pretraining", [1], [0.0], diverged=True)
    made += rows(4, fresh, 2, "tuning", [1, 2], [0.5, 0.6])
    made += rows(4, fresh, 2, "tuning_continued", [3], [0.0], diverged=True)  # the control alone
    metrics = pairing.trial_metrics(pd.DataFrame(made), two_arms(1))
    assert metrics["finished"].tolist() == [False, False, True, True, True]
    assert metrics["diverged"].tolist() == [False, False, True, True, False]
    assert metrics["test_accuracy"].isna().tolist() == [True] * 4 + [False]
    assert metrics["steps"].isna().tolist() == [False, True, False, True, False]


# The gap


def test_gap_and_interval_are_those_of_the_paired_t_test():
    random = np.random.default_rng(1)
    fresh = random.normal(0.8, 0.02, 12)
    warm = fresh - random.normal(0.01, 0.004, 12)
    table = pair_table([*fresh], [*warm]).sample(frac=1, random_state=0)
    row = only(table, two_arms())
    reference = stats.ttest_rel(warm, fresh).confidence_interval(0.95)
    assert row["gap"] == pytest.approx((warm - fresh).mean(), abs=1e-14)
    assert row["gap_ci95"] == pytest.approx([reference.low, reference.high], abs=1e-14)
    assert row["pairs"] == row["trials"] == 12 and row["verdict"] == "worse"
    assert row["test_accuracy"] == pytest.approx(warm.mean(), abs=1e-14)
    unpaired = stats.ttest_ind(warm, fresh).confidence_interval(0.95)
    assert row["gap_ci95"][0] > unpaired.low + 1e-3  # pairing is what narrows it


def test_interval_in_closed_form_and_none_below_three_pairs():
    row = only(pair_table([0.8] * 3, [0.79, 0.78, 0.77]), two_arms())
    half = 0.04302652729911275 / math.sqrt(3)  # t(0.975, 2) = 4.3026...; s = 0.01
    assert row["gap"] == pytest.approx(-0.02, abs=1e-14)
    assert row["gap_ci95"] == pytest.approx([-0.02 - half, -0.02 + half], abs=1e-12)
    row = only(pair_table([0.8] * 2, [0.79, 0.78]), two_arms())
    assert row["gap"] == pytest.approx(-0.015, abs=1e-14)
    assert row["gap_ci95"] is None and row["verdict"] is None and row["pairs"] == 2


def test_pairs_are_matched_by_seed_and_not_by_position():
    table = pair_table([0.1, 0.2, 0.3, 0.4], [0.11, 0.22, 0.33, 0.44])
    table = table[~((table["arm"] == "fresh") & (table["seed"] == 0))]
    table = table[~((table["arm"] == "warm") & (table["seed"] == 2))]
    row = only(table, two_arms())
    assert row["pairs"] == 2 and row["trials"] == 3
    assert row["gap"] == pytest.approx((0.02 + 0.04) / 2, abs=1e-14)
    assert only(table, two_arms(), "fresh")["trials"] == 3


def test_t_interval_covers_what_it_says():
    random = np.random.default_rng(0)
    samples = random.normal(0.3, 1, (1500, 5))
    intervals = np.array([estimates.t_interval(sample) for sample in samples])
    covered = np.mean((intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3))
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1500)


def test_bootstrap_from_twenty_pairs_on():
    random = np.random.default_rng(2)
    gaps = random.normal(-0.01, 0.01, 20)
    table = pair_table([0.8] * 20, [*(0.8 + gaps)])
    row = only(table, two_arms())
    # an own percentile bootstrap, from other random numbers
    means = random.choice(gaps, (20_000, 20)).mean(axis=1)
    assert row["gap_bootstrap_ci95"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=2e-4)
    assert only(table, two_arms())["gap_bootstrap_ci95"] == row["gap_bootstrap_ci95"]
    assert only(table[table["seed"] > 0], two_arms())["gap_bootstrap_ci95"] is None


@pytest.mark.parametrize(
    ("gaps", "fit", "verdict"),
    [
        ((-0.02, -0.021, -0.022), (1.0, 1.0), "worse"),
        ((0.02, 0.021, 0.022), (1.0, 1.0), "better"),
        ((-0.02, 0.021, 0.0), (1.0, 1.0), "undecided"),
        ((-0.02, -0.021, -0.022), (1.0, 0.989), "not fitted"),
        ((-0.02, -0.021, -0.022), (0.989, 1.0), "not fitted"),
        ((-0.02, -0.021, -0.022), (0.99, 0.99), "worse"),
    ],
)
def test_verdicts(gaps, fit, verdict):
    table = pair_table([0.8] * 3, [0.8 + gap for gap in gaps], fit=fit)
    row = only(table, two_arms())
    assert row["verdict"] == verdict
    assert row["gap"] == pytest.approx(np.mean(gaps), abs=1e-14)  # shown whatever the verdict
    fresh = only(table, two_arms(), "fresh")
    assert fresh["verdict"] is None and fresh["gap"] is None and fresh["pairs"] == 0


def diverge(table: pd.DataFrame, arm: str, seeds: range) -> pd.DataFrame:
    """The last rows of some trials become the marked row of a diverged trial."""
    table = table.copy()
    chosen = (table["arm"] == arm) & table["seed"].isin(seeds) & (table["epoch"] == 3)
    metrics = ["train_accuracy", "train_loss", "test_accuracy", "test_loss", "fit_accuracy"]
    table.loc[chosen, metrics] = None
    table.loc[chosen, "diverged"] = True
    return table


@pytest.mark.parametrize("arm", ["fresh", "warm"])
def test_a_diverged_half_leaves_the_gap_and_too_many_take_the_verdict(arm):
    random = np.random.default_rng(3)
    fresh = random.normal(0.8, 0.02, 10)
    warm = fresh - random.normal(0.01, 0.001, 10)
    table = pair_table([*fresh], [*warm])
    row = only(diverge(table, arm, range(1)), two_arms())
    assert row["pairs"] == 9 and row["trials"] == 10
    assert row["diverged"] == (1 if arm == "warm" else 0)
    assert row["gap"] == pytest.approx((warm - fresh)[1:].mean(), abs=1e-14)
    assert row["verdict"] == "worse"  # a tenth is allowed
    row = only(diverge(table, arm, range(2)), two_arms())
    assert row["verdict"] is None and row["gap_ci95"] is not None and row["pairs"] == 8
    assert row["test_accuracy"] == pytest.approx(warm[2:].mean() if arm == "warm" else warm.mean(), abs=1e-14)


def test_a_table_of_another_config_is_refused():
    table = pair_table([0.8], [0.7])
    with pytest.raises(InputError, match="arm 'warm' that the config lacks"):
        summaries.summary(table, dataclasses.replace(two_arms(), arms=two_arms().arms[:1]))
    with pytest.raises(InputError, match="two trials of arm 'warm' and seed 0"):
        summaries.summary(pd.concat([table, table.assign(trial=9, arm="warm")]), two_arms())


def test_summary_is_plain_json_with_every_key_in_every_arm():
    swept = ("length", "rate")
    arms = (
        {"arm": "fresh", "length": np.int64(0), "rate": None},
        {"arm": "warm", "length": np.int64(4), "rate": np.float64("nan")},
    )
    setting = Setting(swept, arms, {"fresh": "fresh", "warm": "fresh"}, 2, True)
    table = pair_table([0.8], [0.7])
    for part in (table, table.iloc[:0], table[table["epoch"] < 3]):
        summary = summaries.summary(part, setting)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert [list(row) for row in summary] == [
            [
                *("arm", "length", "rate", "trials", "pairs", "diverged", "unreached"),
                *("test_accuracy", "train_accuracy", "fit_accuracy", "min_fit_accuracy"),
                *("gap", "gap_ci95", "gap_bootstrap_ci95"),
                *("pairs_equal_updates", "gap_equal_updates", "gap_equal_updates_ci95", "verdict"),
            ]
        ] * 2
    assert summary[1]["trials"] == 0 and summary[1]["test_accuracy"] is None


# The control for training time


def control_table(pretraining_epochs: int, *, diverged: bool = False) -> pd.DataFrame:
    """One pair, evaluated every 3 epochs of 10 steps: warm ends at 100 + 5 pretraining_epochs."""
    fresh, warm = two_arms().arms
    made = rows(0, fresh, 0, "tuning", [3, 6, 9, 10], [0.1, 0.2, 0.3, 0.4])
    made += rows(0, fresh, 0, "tuning_continued", [12, 15, 16], [0.5, 0.6, 0.7], diverged=diverged)
    made += rows(1, warm, 0, "pretraining", [pretraining_epochs], [0.5], size=HALF)
    start = pretraining_epochs * HALF
    made += rows(1, warm, 0, "tuning", [3, 6, 9, 10], [0.0, 0.0, 0.45, 0.55], start=start)
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    ("pretraining_epochs", "control"),
    [
        (10, (0.5 + 0.6) / 2),  # 150 updates: epochs 12 and 15, over 11
        (9, (0.3 + 0.4 + 0.5) / 3),  # 145: epochs 9, 10, 12, over 8, from both stages
        (12, (0.6 + 0.7) / 2),  # 160: epochs 15 and 16, over 12
        (17, (0.6 + 0.7) / 2),  # 185: 25 steps past the last evaluation, less than the 30 between
        (18, None),  # 190: it was never trained on that far
    ],
)
def test_equal_updates_by_hand(pretraining_epochs, control):
    table = control_table(pretraining_epochs)
    row = only(table, two_arms(4, equal_updates=True))
    assert row["gap"] == pytest.approx(0.5 - 0.35, abs=1e-14)
    if control is None:
        assert row["gap_equal_updates"] is None and row["pairs_equal_updates"] == 0
    else:
        assert row["gap_equal_updates"] == pytest.approx(0.5 - control, abs=1e-14)
        assert row["pairs_equal_updates"] == 1
    assert only(table, two_arms(4))["gap_equal_updates"] is None  # not asked for


def test_a_control_that_diverged_leaves_only_the_gap_at_equal_updates():
    setting = two_arms(4, equal_updates=True)
    row = only(control_table(12, diverged=True), setting)  # found at 160 updates
    assert row["gap_equal_updates"] is None and row["pairs"] == 1 and row["diverged"] == 0
    row = only(control_table(10, diverged=True), setting)  # sound at 150
    assert row["gap_equal_updates"] == pytest.approx(0.5 - 0.55, abs=1e-14)


def test_interval_at_equal_updates_is_paired_too():
    setting = two_arms(4, equal_updates=True)
    shifts = (0.0, 0.01, 0.03)
    tables = []
    for seed, shift in enumerate(shifts):
        table = control_table(10)
        table["seed"], table["trial"] = seed, table["trial"] + 2 * seed
        table.loc[table["arm"] == "warm", "test_accuracy"] -= shift
        tables.append(table)
    row = only(pd.concat(tables), setting)
    reference = stats.ttest_1samp([-0.05 - shift for shift in shifts], 0).confidence_interval()
    assert row["pairs_equal_updates"] == 3
    assert row["gap_equal_updates_ci95"] == pytest.approx([*reference], abs=1e-14)
