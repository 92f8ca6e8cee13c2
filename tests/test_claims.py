"""The verdicts on claims: tables of known truth for every claim and verdict, errors of whole tables, the command."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import rows

import plastic_jax
from experiments import claims as command
from experiments import warm_start
from plastic_jax.claims import evidence, rules, verdict_table, verdicts
from plastic_jax.claims.evidence import Evidence
from plastic_jax.claims.measures import Measured, Sample
from plastic_jax.claims.rules import CLAIMS
from plastic_jax.errors import InputError
from plastic_jax.results import inference, tables
from plastic_jax.results.settings import Setting
from plastic_jax.running import experiment
from plastic_jax.study.config import Config, canonical

SEEDS, EPOCHS = 8, 40
# fields of the experiments that are not in every config, with their values on a fresh arm
EXTRA = {
    "multi_stage": {"pretraining_stages": 0, "uniform_fraction": None},
    "module_reset": {"reset": None},
    "online": {"intervention": "reinitialise", "chunk_examples": 5000},
}
WARM = "warm_start_epochs"
LONG = {WARM: 350}


def noise(*key: int) -> np.ndarray:
    """A number a seed, of mean 0 and standard deviation 0.002 to the last bits."""
    draw = np.random.default_rng([7, *key]).normal(size=SEEDS)
    return 0.002 * (draw - draw.mean()) / draw.std(ddof=1)


def made(
    name: str,
    arms: list[tuple[dict, float]],
    *,
    fit: float = 1.0,
    pretraining_fit: float = 0.6,
    epochs: list | None = None,
    seeds: int = SEEDS,
    diverged: int = 0,
    common: dict | None = None,
    fresh: dict | None = None,
    control: float | None = None,
    key: int = 0,
    spread: float = 1.0,
) -> Evidence:
    """A finished run: a fresh arm, and `arms` with their values and true gaps (exact as means over the seeds).

    `spread`: standard deviation of the gaps, in 0.2 points. `epochs`: each arm's epochs to 99 % train accuracy, the
    fresh one's first, a number or one a seed; None: never. `diverged`: seeds of each arm that diverged. `control`: what
    the fresh arm gains until equal updates.
    """
    base = {**canonical(Config()), "warm_start_epochs": 0, **EXTRA.get(name, {}), **(common or {}), **(fresh or {})}
    values = [base] + [{**base, **(common or {}), **own} for own, _ in arms]
    names = [f"arm {k}" for k in range(len(values))]
    table: list[dict] = []
    reached = epochs or [10] * len(values)
    for k, arm in enumerate(names):
        accuracy = 0.8 + noise(99) + ((arms[k - 1][1] + spread * noise(key, k)) if k else 0)
        for seed in range(seeds):
            trial, start = k * seeds + seed, 0
            if k:
                size = 500
                table += rows(trial, {"arm": arm}, seed, "pretraining", [4], [0.5], size=size, fit=pretraining_fit)
                start = 2000
            tuning = rows(
                trial,
                {"arm": arm},
                seed,
                "tuning",
                [*range(1, EPOCHS + 1)],
                [float(accuracy[seed])] * EPOCHS,
                start=start,
                fit=fit,
                diverged=seed < diverged,
            )
            first = reached[k][seed] if isinstance(reached[k], list) else reached[k]
            for row in tuning:
                row["train_accuracy"] = 1.0 if first is not None and row["epoch"] - start / 1000 >= first else 0.9
                row["epoch"] -= start / 1000
            table += tuning
            if not k and control is not None:
                more = [EPOCHS + 1, EPOCHS + 2]
                table += rows(trial, {"arm": arm}, seed, "tuning_continued", more, [accuracy[seed] + control] * 2)
    setting = Setting((), tuple({"arm": arm} for arm in names), dict.fromkeys(names, names[0]), 2, control is not None)
    paper = {n: (value,) for n, value in canonical(Config()).items()}
    paper |= {n: tuple({arm[n] for arm in values}) for own, _ in arms for n in own}
    paper |= {"metric_epochs": (2,), WARM: (0, 350)}
    return Evidence(
        f"runs/{name}-{key}", name, pd.DataFrame(table), setting, dict(zip(names, values, strict=True)), paper
    )


def row_of(claim: str, *found: Evidence) -> dict:
    judged = [row for row in verdicts.judge(found)["rows"] if row["claim"] == claim]
    assert len(judged) == 1
    return judged[0]


OPTIMISERS = [{**LONG, "optimizer": name} for name in ("adam", "rmsprop", "sgd", "momentum")]
GAMMAS = [{"transition": "smooth", "gamma": gamma, WARM: None} for gamma in (0.1, 0.5, 0.9)]
STAGES = [{"pretraining_stages": n, "uniform_fraction": 1.0} for n in (1, 2, 4)]
FRACTIONS = [{"pretraining_stages": 2, "uniform_fraction": r} for r in (1.0, 0.5, 0.0)]
SIZES = [{**LONG, "depth": depth, "width": width} for depth in (1, 2) for width in (16, 32)]
LATE = [{**LONG, "reset": reset} for reset in ("none", "3-6", "2-6")]
SMALL = [{**LONG, "reset": reset} for reset in ("none", "6", "1", "1+2")]
RATES = [{**LONG, "tuning_learning_rate_factor": factor} for factor in (1.0, 10.0)]
ONLINE = [{"intervention": "none"}]

# claim, experiment, arms, and gaps that support it, refute it, leave it undecided
CASES = [
    ("warm-below-fresh", "warm_start", [LONG], [-0.02], [0.02], [0.0]),
    ("early-gap", "warm_start", [{WARM: 5}, {WARM: 10}, LONG], [0, -0.02, 0], [-0.02, 0.02, -0.02], [-0.02, 0, -0.02]),
    ("every-optimiser", "warm_start", OPTIMISERS, [-0.02] * 4, [-0.02, -0.02, 0.02, -0.02], [-0.02, 0, -0.02, -0.02]),
    ("every-gamma", "smooth_transition", GAMMAS, [-0.02] * 3, [-0.02, 0.02, -0.02], [-0.02, -0.02, 0]),
    ("falls-with-stages", "multi_stage", STAGES, [-0.01, -0.02, -0.03], [0.01, 0.02, 0.03], [0, 0, 0]),
    ("falls-with-stages", "multi_stage", STAGES, [-0.02, -0.02, -0.02], [-0.04, -0.02, -0.04], [0, 0.001, -0.001]),
    ("imbalance-widens", "multi_stage", FRACTIONS, [-0.01, -0.02, -0.03], [-0.03, -0.02, -0.01], [-0.02] * 3),
    ("every-size", "capacity", SIZES, [-0.02] * 4, [-0.02, 0.02, -0.02, -0.02], [-0.02, -0.02, -0.02, 0]),
    ("late-reset-recovers", "module_reset", LATE, [-0.02, -0.001, 0.001], [-0.02, -0.01, 0], [-0.02, -0.005, 0]),
    ("late-reset-recovers", "module_reset", LATE, [-0.01, 0, 0], [-0.02, -0.02, -0.02], [-0.02, 0.02, 0]),
    ("late-reset-recovers", "module_reset", LATE, [-0.01, 0, 0], [-0.01, 0, -0.01], [-0.005, 0, 0]),
    (
        "small-resets-do-not",
        "module_reset",
        SMALL,
        [-0.02] * 4,
        [-0.02, 0, -0.02, -0.02],
        [-0.02, -0.005, -0.02, -0.02],
    ),
    ("small-resets-do-not", "module_reset", SMALL, [-0.01] * 4, [-0.02, -0.02, 0.02, -0.02], [0, 0, 0, 0]),
    ("faster-tuning-shrinks", "tuning_learning_rate", RATES, [-0.02, -0.004], [-0.02, -0.02], [-0.02, -0.01]),
    ("faster-tuning-shrinks", "tuning_learning_rate", RATES, [-0.02, 0.02], [-0.02, -0.03], [0.02, 0.03]),
    ("faster-tuning-leaves-a-gap", "tuning_learning_rate", RATES, [-0.02, -0.004], [-0.02, 0.004], [-0.02, 0]),
    ("online-warm-below-fresh", "online", ONLINE, [-0.02], [0.02], [0]),
]


@pytest.mark.parametrize(("claim", "name", "arms", "supports", "refutes", "neither"), CASES)
def test_every_claim_gets_the_verdict_of_a_known_truth(claim, name, arms, supports, refutes, neither):
    for gaps, verdict in ((supports, "supported"), (refutes, "refuted"), (neither, "undecided")):
        row = row_of(claim, made(name, list(zip(arms, gaps, strict=True))))
        assert row["verdict"] == verdict, (gaps, row)
        assert row["says"] == f"{verdict} for resnet on cifar10 ({'' if row['scope'] == 'paper' else 'not '}" + (
            "Ash & Adams' setting)" if name == "online" else "the paper's setting)"
        )
    for gaps in (supports, refutes):
        row = row_of(claim, made(name, list(zip(arms, gaps, strict=True)), fit=0.95))
        assert row["verdict"] == "not fitted" and not row["fitted"] and row["fit"] == pytest.approx(0.95)


def test_every_claim_of_the_paper_has_a_case():
    assert {case[0] for case in CASES} | {"both-fit", "no-gain-in-speed"} == {claim.name for claim in CLAIMS}
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize(
    ("fit", "verdict"), [(1.0, "supported"), (0.997, "supported"), (0.995, "undecided"), (0.97, "refuted")]
)
def test_both_at_full_train_accuracy_needs_no_fit_to_be_judged(fit, verdict):
    run = made("warm_start", [(LONG, 0.0)], fit=fit)
    exact = run.table["fit_accuracy"].notna() & (run.table["stage"] == "tuning")
    run.table.loc[exact, "fit_accuracy"] -= 1e-4 * (run.table.loc[exact, "seed"] - 3.5)
    row = row_of("both-fit", run)
    assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(fit - 1)


def test_a_pretraining_that_fits_its_data_says_nothing_of_an_early_gap():
    for gap in (-0.02, 0.02):
        row = row_of("early-gap", made("warm_start", [({WARM: 10}, gap)], pretraining_fit=1.0))
        assert row["verdict"] == "undecided"
        assert "condition not met" in row["notes"][0]


SPEED = [{**LONG, "reset": "2-6"}, {**LONG, "reset": "3-6"}]
SPREAD = [19, 20, 21, 20, 19, 20, 21, 20]


@pytest.mark.parametrize(
    ("epochs", "verdict"),
    [
        ([SPREAD, SPREAD[::-1], SPREAD], "supported"),
        ([SPREAD, [e - 5 for e in SPREAD], SPREAD], "refuted"),  # one arm is faster
        ([SPREAD, [e - 2 for e in SPREAD[::-1]], SPREAD], "undecided"),  # just at the margin
        ([SPREAD, [e + 10 for e in SPREAD], SPREAD], "undecided"),  # slower: neither equal nor a gain
    ],
)
def test_speed_is_the_ratio_of_epochs(epochs, verdict):
    row = row_of("no-gain-in-speed", made("module_reset", [(arm, 0.0) for arm in SPEED], epochs=epochs))
    assert row["verdict"] == verdict
    ratio = np.exp(np.mean(np.log(epochs[1]) - np.log(epochs[0]))) - 1
    assert row["parts"][0]["effect"] == pytest.approx(ratio)
    assert row_of("no-gain-in-speed", made("module_reset", [(a, 0.0) for a in SPEED], epochs=epochs, fit=0.9))[
        "verdict"
    ] == ("not fitted")


def test_a_censored_trial_is_a_bound_and_never_helps():
    def judged(fresh: list, arm: list) -> dict:
        return row_of("no-gain-in-speed", made("module_reset", [(SPEED[0], 0.0)], epochs=[fresh, arm]))

    slow = [None, *SPREAD[1:]]
    row = judged(SPREAD, slow)  # the arm never got there in one seed: no upper end
    assert row["verdict"] == "undecided" and row["effect"] is None
    assert row["effect_ci95"][0] is not None and row["effect_ci95"][1] is None
    assert row["notes"] == ["1 trials never saw 99 % train accuracy"] and row["seeds_needed"] is None
    row = judged(slow, SPREAD)  # the fresh arm did not: no lower end
    assert row["verdict"] == "undecided" and row["effect_ci95"][0] is None
    # A fresh trial that took at least 40 epochs, against arms that are all faster: still refuted, by its bound.
    row = judged([None, *SPREAD[1:]], [10, *(e - 8 for e in SPREAD[1:])])
    assert row["verdict"] == "refuted"
    row = judged([*SPREAD[:-1], None], [*(e - 8 for e in SPREAD[:-1]), None])  # unknown in one seed
    assert row["verdict"] == "undecided" and row["effect_ci95"] == [None, None]


def evaluated_every(run: Evidence, every: int) -> Evidence:
    """The run as it had been with --config.eval_every: a stage's end is always there."""
    last = run.table.groupby(["trial", "stage"])["epoch"].transform("max")
    return dataclasses.replace(run, table=run.table[(run.table["epoch"] % every == 0) | (run.table["epoch"] == last)])


def test_coarse_epochs_decide_nothing_by_themselves():
    """Networks 20 to 30 % faster, which an evaluation every tenth epoch sees at the same one."""
    slow, fast = [20, 19, 20, 18, 20, 19, 20, 20], [14, 15, 13, 14, 15, 14, 13, 14]
    run = made("module_reset", [(SPEED[0], 0.0)], epochs=[slow, fast])
    assert row_of("no-gain-in-speed", run)["verdict"] == "refuted"
    row = row_of("no-gain-in-speed", evaluated_every(run, 10))
    assert row["verdict"] == "undecided" and row["seeds_needed"] is None
    assert row["effect"] == pytest.approx(0) and row["effect_ci95"] == pytest.approx([11 / 20 - 1, 20 / 11 - 1])
    assert row["notes"][0].startswith("epochs are known to 10, between two evaluations")
    bounds = evaluated_every(run, 10).epochs_to("arm 1", 0.99)
    assert bounds["low"].tolist() == [11] * SEEDS and bounds["high"].tolist() == [20] * SEEDS
    exact = run.epochs_to("arm 1", 0.99)
    assert exact["low"].tolist() == exact["high"].tolist() == fast
    # Coarse epochs decide where the bounds do: three times as fast, at every other epoch.
    row = row_of("no-gain-in-speed", evaluated_every(made("module_reset", [(SPEED[0], 0.0)], epochs=[30, 10]), 2))
    assert row["verdict"] == "refuted"


def test_too_few_pairs_and_too_many_diverged_decide_nothing():
    row = row_of("warm-below-fresh", made("warm_start", [(LONG, -0.1)], seeds=2))
    assert row["verdict"] == "undecided" and row["notes"] == ["fewer than 3 pairs"] and row["effect_ci95"] is None
    row = row_of("warm-below-fresh", made("warm_start", [(LONG, -0.1)], diverged=2))
    assert row["verdict"] == "undecided" and "diverged" in row["notes"][0]
    assert row["pairs"] == SEEDS - 2 and row["diverged"] == 4


def test_named_levels_are_needed_for_support_and_not_for_refutation():
    three = list(zip(OPTIMISERS[:3], [-0.02] * 3, strict=True))
    row = row_of("every-optimiser", made("warm_start", three))
    assert row["verdict"] == "undecided" and row["notes"] == ["not supported without momentum"]
    row = row_of("every-optimiser", made("warm_start", [*three[:2], (OPTIMISERS[2], 0.02)]))
    assert row["verdict"] == "refuted"
    row = row_of("late-reset-recovers", made("module_reset", list(zip(LATE[:2], [-0.02, 0], strict=True))))
    assert row["verdict"] == "undecided" and row["notes"] == ["not supported without the reset of 2+3+4+5+6"]
    row = row_of("small-resets-do-not", made("module_reset", list(zip(SMALL[1:], [-0.02] * 3, strict=True))))
    assert row["verdict"] == "undecided" and "no arm without a reset" in row["notes"]


def test_levels_too_few_for_a_claim_are_not_judged():
    found = verdicts.judge([made("multi_stage", [(STAGES[0], -0.02)])])
    assert found["rows"] == [] and len(found["untested"]) == len(CLAIMS)
    network = {"model": "mlp", "depth": 3}  # four modules
    assert verdicts.judge([made("module_reset", [(arm, -0.02) for arm in LATE[:1]], common=network)])["rows"] == []


def test_a_claim_is_judged_once_in_each_other_setting():
    noisy = [({**LONG, "label_noise": share}, gap) for share, gap in ((0.0, -0.02), (0.2, 0.02))]
    found = [row for row in verdicts.judge([made("warm_start", noisy)])["rows"] if row["claim"] == "warm-below-fresh"]
    assert [(row["verdict"], row["setting"]["label_noise"]) for row in found] == [("refuted", 0.2), ("supported", 0.0)]
    assert "resnet on cifar10 (label_noise=0.2" in verdict_table.terminal({"rows": found, "untested": []})


def test_a_field_without_effect_on_an_arm_matches_every_value():
    carried = [{**LONG, "optimizer": "adam", "reset_optimizer": reset} for reset in (True, False)]
    serves = {**LONG, "optimizer": "sgd", "reset_optimizer": None}
    arms = [*carried, serves]
    run = made("warm_start", list(zip(arms, [-0.02] * 3, strict=True)))
    found = [row for row in verdicts.judge([run])["rows"] if row["claim"] == "every-optimiser"]
    assert [len(row["parts"]) for row in found] == [2, 2]


def test_the_largest_number_of_pretraining_epochs_counts():
    row = row_of("warm-below-fresh", made("warm_start", [({WARM: 50}, 0.02), (LONG, -0.02), ({WARM: 100}, 0.02)]))
    assert row["verdict"] == "supported" and row["shown"] == f"{WARM}=350" and row["scope"] == "paper"


@pytest.mark.parametrize(
    "changes", [{"dataset": "digits"}, {"model": "mlp"}, {"label_noise": 0.2}, {"compute_dtype": "bfloat16"}]
)
def test_another_setting_is_not_the_papers(changes):
    row = row_of("warm-below-fresh", made("warm_start", [(LONG, 0.02)], common=changes))
    where = f"{changes.get('model', 'resnet')} on {changes.get('dataset', 'cifar10')}"
    assert row["scope"] == "other" and row["says"] == f"refuted for {where} (not the paper's setting)"


def test_shorter_pretraining_or_another_metric_is_not_the_papers_setting():
    assert row_of("warm-below-fresh", made("warm_start", [({WARM: 200}, -0.02)]))["scope"] == "other"
    run = made("warm_start", [(LONG, -0.02)])
    longer = dataclasses.replace(run, paper={**run.paper, "metric_epochs": (100,)})
    assert row_of("warm-below-fresh", longer)["scope"] == "other"


def test_other_levels_are_not_the_papers_setting():
    run = made("capacity", [(arm, -0.02) for arm in SIZES])
    assert row_of("every-size", run)["scope"] == "paper"
    wide = dataclasses.replace(run, paper={**run.paper, "width": (64, 128)})
    assert row_of("every-size", wide)["scope"] == "other"


def test_a_control_is_not_the_papers_setting():
    arms = [({**rate, "schedule": name}, -0.02) for rate in RATES for name in ("constant", "cosine")]
    run = made("tuning_learning_rate", arms)
    run = dataclasses.replace(run, paper={**run.paper, "schedule": ("constant", "cosine")})
    found = [row for row in verdicts.judge([run])["rows"] if row["claim"] == "faster-tuning-leaves-a-gap"]
    assert {row["setting"]["schedule"]: row["scope"] for row in found} == {"constant": "paper", "cosine": "other"}


def test_equal_updates_stand_beside_the_verdict_and_do_not_change_it():
    row = row_of("warm-below-fresh", made("warm_start", [(LONG, -0.02)], control=-0.03))
    assert row["verdict"] == "supported" and row["effect"] == pytest.approx(-0.02)
    assert row["equal_updates"] == pytest.approx(0.01)
    assert row["equal_updates_ci95"][0] > 0
    assert row_of("warm-below-fresh", made("warm_start", [(LONG, -0.02)]))["equal_updates"] is None


def test_at_every_shows_the_least_favourable_level():
    row = row_of("every-gamma", made("smooth_transition", list(zip(GAMMAS, [-0.03, -0.01, -0.02], strict=True))))
    assert row["shown"] == "gamma=0.5" and row["effect"] == pytest.approx(-0.01)
    assert [part["level"] for part in row["parts"]] == ["gamma=0.1", "gamma=0.5", "gamma=0.9"]


def test_two_runs_on_one_setting_are_refused():
    with pytest.raises(InputError, match=r"runs/warm_start-0 and runs/warm_start-1 both judge.*-2\.00 and \+2\.00"):
        verdicts.judge([made("warm_start", [(LONG, -0.02)]), made("warm_start", [(LONG, 0.02)], key=1)])


def test_seeds_needed_reach_80_percent_power_in_simulation():
    """A quarter of 1.3 points, at a spread of 0.2 points; with one seed less the power is lower."""
    row = row_of("faster-tuning-leaves-a-gap", made("tuning_learning_rate", list(zip(RATES, [0, 0], strict=True))))
    draw, power = np.random.default_rng(0), {}
    for count in (row["seeds_needed"] - 1, row["seeds_needed"]):
        gaps = draw.normal(-0.013 / 4, 0.002, (4000, count))
        power[count] = np.mean([verdicts.p_values(Sample("", g, g), (-np.inf, 0.0))[0] <= 0.025 for g in gaps])
    few, enough = power.values()
    assert few < 0.8 - 0.02 < 0.8 <= enough + 0.02
    assert row["seeds_needed_in_table"] > row["seeds_needed"] > 3
    one = row_of("warm-below-fresh", made("warm_start", [(LONG, -0.02)], spread=5))
    four = row_of("every-optimiser", made("warm_start", list(zip(OPTIMISERS, [-0.02] * 4, strict=True)), spread=5))
    assert four["seeds_needed"] > one["seeds_needed"]  # all four together


# Errors of whole tables


def samples(draw, n: int, *means: float) -> list[Sample]:
    values = [draw.normal(mean, 0.006, n) for mean in means]
    return [Sample("", v, v) for v in values]


def null_table(draw: np.random.Generator, n: int) -> list[tuple[float, float]]:
    """A row of each kind, with a truth at which both its verdicts would be false."""
    low, margins = (-np.inf, 0.0), (-rules.MARGIN, rules.MARGIN)
    levels = np.cumsum(draw.normal(0, 0.006, (n, 4)), axis=1)
    steps = [Sample("", d, d) for d in np.diff(levels).T]
    slope = inference.trend(levels)
    gap = (samples(draw, n, -0.05)[0], 0.0)
    kinds = [
        (Measured(samples(draw, n, 0.0)), low),
        (Measured(samples(draw, n, 0.0, -0.05, -0.05)), low),
        (Measured(samples(draw, n, 0.0, 0.0, 0.0)), low),
        (Measured(samples(draw, n, -rules.MARGIN)), margins),
        (Measured(samples(draw, n, -rules.MARGIN, 0.0), conditions=[gap]), margins),
        (Measured(samples(draw, n, -rules.MARGIN, -0.05)), (-np.inf, -rules.MARGIN)),
        (Measured(samples(draw, n, 0.0), conditions=[gap]), (0.0, np.inf)),
        (Measured([Sample("", slope, slope)], steps), low),
    ]
    return [verdicts.weigh(measured, bounds) for measured, bounds in kinds]


@pytest.mark.parametrize(("n", "true"), [(5, 0), (16, 0), (8, 4)])
def test_any_false_verdict_in_a_table_has_five_percent_at_most(n, true):
    """Under the complete null, and with some claims true beside it; without Holm it is far more."""
    draw, runs = np.random.default_rng(n), 1000
    false = plain = 0
    gc.collect()
    gc.freeze()  # statsmodels collects garbage in each correction: of what is here, none
    for _ in range(runs):
        table = null_table(draw, n)
        beside = [verdicts.weigh(Measured(samples(draw, n, -0.05)), (-np.inf, 0.0)) for _ in range(true)]
        decided = verdicts.decide(beside + table)
        false += any(verdict != "undecided" for verdict, _, _ in decided[true:])
        plain += any(min(row) <= rules.ALPHA / 2 for row in table)
    gc.unfreeze()
    assert false / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert plain / runs > 0.12


def test_holm_runs_over_both_p_values_of_every_row():
    assert verdicts.decide([(0.02, 0.98)])[0] == ("supported", 0.04, pytest.approx(0.98))
    assert verdicts.decide([(0.03, 0.97)])[0][0] == "undecided"
    found = verdicts.decide([(0.02, 0.98), (1.0, 1.0)])  # a row that cannot be judged counts
    assert [row[0] for row in found] == ["undecided", "undecided"] and found[0][1] == pytest.approx(0.08)
    assert [row[0] for row in verdicts.decide([(0.99, 0.001), (0.012, 0.99)])] == ["refuted", "supported"]
    assert verdicts.decide([(0.001, 0.001)])[0][0] == "refuted"


# Tables


def test_tables_put_refutations_first_and_json_holds_no_nan():
    runs = [
        made("warm_start", [(LONG, -0.02)]),
        made("online", [(ONLINE[0], 0.02)]),
        made("module_reset", [(a, 0.0) for a in SPEED], epochs=[SPREAD, [None] * SEEDS, SPREAD]),
        made("capacity", [(arm, -0.02) for arm in SIZES], fit=0.9),
    ]
    found = verdicts.judge(runs)
    order = [row["verdict"] for row in found["rows"]]
    assert order == sorted(order, key=verdicts.ORDER.index) and set(order) == set(verdicts.ORDER)
    json.dumps(found, allow_nan=False)
    text = verdict_table.terminal(found)
    assert text.isascii() and text.splitlines()[2].startswith("refuted") and "+2.00 [" in text
    page = verdict_table.markdown(found)
    assert page.splitlines()[2].startswith("| **refuted** for resnet on cifar10")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == len(order) + 2
    assert "figure 3" in page and "Not tested" in page


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "warm"
    config = dict(
        dataset="digits", train_examples=60, model="mlp", width=8, depth=1, norm="none", batch_size=10,
        warm_start_epochs=(0, 5), tuning_epochs=4, metric_epochs=2, seeds=3,
    )  # fmt: skip
    plastic_jax.run(config, path, study=warm_start.EXPERIMENT, wandb="disabled", progress=False, say=lambda text: None)
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "experiments.claims", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return done.returncode, done.stdout, done.stderr


def test_a_real_run_from_the_command_line(finished, tmp_path):
    code, out, err = call(finished, f"--out={tmp_path / 'out'}")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert {row["claim"] for row in found["rows"]} == {"warm-below-fresh", "both-fit", "early-gap"}
    assert all(row["pairs"] == 3 and row["scope"] == "other" and row["model"] == "mlp" for row in found["rows"])
    own = {row["claim"]: row for row in found["rows"]}["warm-below-fresh"]
    gap = plastic_jax.load(finished).summary[1]
    assert own["effect"] == pytest.approx(gap["gap"]) and own["effect_ci95"] == pytest.approx(gap["gap_ci95"])
    assert own["equal_updates"] == pytest.approx(gap["gap_equal_updates"])
    assert own["verdict"] == "not fitted" and gap["verdict"] == "not fitted"
    assert found["rules"] == rules.__doc__
    assert "warm-below-fresh" in out and str(tmp_path / "out" / "claims.md") in out
    assert "| claim |" in (tmp_path / "out" / "claims.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "no workdir is named"), (["nowhere"], "is no workdir"), (["--aut=x"], "Unknown command line flag")],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words):
    code, out, err = call(*arguments)
    assert code == 2 and "Traceback" not in err and out == ""
    assert err.startswith("error: ") and words in err.splitlines()[0]


def changed(finished: Path, to: Path, **config: object) -> str:
    """A copy of the run's files, with other values in config.json; None removes one."""
    to.mkdir()
    for name in ("config.json", "summary.json", "results.parquet"):
        (to / name).write_bytes((finished / name).read_bytes())
    held = {**json.loads((to / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({name: value for name, value in held.items() if value is not None}))
    return str(to)


def refused(words: str, *workdirs: object, out: object = "unused") -> None:
    with pytest.raises(InputError, match=words):
        command.judge([str(path) for path in workdirs], str(out))


def test_runs_that_cannot_be_judged_are_refused(finished, tmp_path):
    refused("named twice", finished, f"{finished}/../{finished.name}")
    refused("both judge the claim.*find the same", finished, changed(finished, tmp_path / "copy"))
    refused("unknown experiment, 'cold_start'", changed(finished, tmp_path / "cold", experiment="cold_start"))
    refused("unknown experiment, 'claims'", changed(finished, tmp_path / "claims", experiment="claims"))
    refused("unknown experiment, '../x'", changed(finished, tmp_path / "up", experiment="../x"))
    refused("config.json is missing, damaged or unreadable", changed(finished, tmp_path / "old", datasets=None))
    config = json.loads((finished / "config.json").read_text())["config"]
    refused("color is no field", changed(finished, tmp_path / "color", config={**config, "color": 1}))
    refused("it has other trials", changed(finished, tmp_path / "more", config={**config, "seeds": 4}))


def test_unfinished_and_damaged_runs_are_refused(finished, tmp_path):
    without = Path(changed(finished, tmp_path / "without"))
    (without / "summary.json").unlink()
    refused("not a finished run: it has no summary", without)
    short = Path(changed(finished, tmp_path / "short"))
    table = plastic_jax.load(finished).table
    tables.write(table[table["trial"] != 4], short / "results.parquet", ["warm_start_epochs"])
    refused("not a finished run: 1 of its 6 trials", short)
    other = Path(changed(finished, tmp_path / "other"))
    table = table.assign(test_accuracy=table["test_accuracy"] ** 2)
    tables.write(table, other / "results.parquet", ["warm_start_epochs"])
    refused("does not agree with results.parquet", other)
    (other / "results.parquet").write_bytes(b"no table")
    refused("no readable results table", other)
    (other / "config.json").write_text("{")
    refused("damaged or unreadable", other)


def test_a_folder_that_cannot_be_written_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--out=.* cannot be written", finished, out=tmp_path / "file")


def test_the_papers_values_are_the_presets():
    found = evidence.paper_values(experiment.Experiment(presets={"paper": {"warm_start_epochs": (0, 10)}}))
    assert (
        found["warm_start_epochs"] == (0, 10) and found["dataset"] == ("cifar10",) and found["metric_epochs"] == (100,)
    )
