"""The verdicts on claims: tables of known truth for every claim and verdict, errors of whole tables, the command."""

import dataclasses

import numpy as np
import pytest
from claim_runs import LONG, ONLINE, OPTIMISERS, RATES, SEEDS, SIZES, SPEED, SPREAD, WARM, made, row_of

from plastic_jax.claims import verdict_table, verdicts
from plastic_jax.claims.evidence import Evidence
from plastic_jax.claims.rules import CLAIMS
from plastic_jax.errors import InputError

GAMMAS = [{"transition": "smooth", "gamma": gamma, WARM: None} for gamma in (0.1, 0.5, 0.9)]

STAGES = [{"pretraining_stages": n, "uniform_fraction": 1.0} for n in (1, 2, 4)]

FRACTIONS = [{"pretraining_stages": 2, "uniform_fraction": r} for r in (1.0, 0.5, 0.0)]

LATE = [{**LONG, "reset": reset} for reset in ("none", "3-6", "2-6")]

SMALL = [{**LONG, "reset": reset} for reset in ("none", "6", "1", "1+2")]

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
