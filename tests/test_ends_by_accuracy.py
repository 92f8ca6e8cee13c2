"""Contract 3: stages that end by accuracy, and the control whose length they decide."""

import numpy as np
import tiny

from plastic_jax.results import settings, summaries

# 3. Stages that end by accuracy.


def test_a_stage_ends_at_the_trials_own_first_epoch_of_that_accuracy():
    full = tiny.trained(tiny.study(warm_start_epochs=(0,), tuning_epochs=30, equal_updates=False, seeds=4))
    study = tiny.study(warm_start_epochs=(0,), tuning_epochs=30, stage_accuracy=0.6, equal_updates=False, seeds=4)
    found = tiny.trained(study, slots=4)
    ends = set()
    for seed, rows in full.groupby("seed"):
        first = rows[rows.train_accuracy >= 0.6].iloc[0]
        own = found[found.seed == seed]
        ignore = ["fit_accuracy", "accuracy_reached"]
        tiny.same(rows[rows.step <= first.step].drop(columns=ignore[:1]), own.drop(columns=ignore))
        assert own.accuracy_reached.tolist() == [None] * (len(own) - 1) + [True]
        assert own.fit_accuracy.notna().tolist() == [False] * (len(own) - 1) + [True]
        ends.add(first.step)
    assert len(ends) > 1, "the trials should stop at different steps"
    tiny.same(found, tiny.trained(study, slots=8, devices=2))


def test_a_stage_by_accuracy_stops_within_a_chunk():
    """Evaluated every 7 epochs, it still stops at the epoch itself."""
    every = dict(warm_start_epochs=(0,), tuning_epochs=30, stage_accuracy=0.6, equal_updates=False, seeds=3)
    fine = tiny.trained(tiny.study(**every)).groupby("seed").tail(1)
    coarse = tiny.trained(tiny.study(eval_every=7, **every)).groupby("seed").tail(1)
    tiny.same(fine, coarse)


def test_the_control_of_stages_by_accuracy_learns_its_length():
    study = tiny.study(warm_start_epochs=(0, 20), tuning_epochs=20, stage_accuracy=0.6, seeds=3)
    found = tiny.trained(study)
    for _, rows in found.groupby("seed"):
        warm = rows[rows.warm_start_epochs == 20].step.max()
        fresh = rows[rows.warm_start_epochs == 0]
        ended = fresh[fresh.stage == "tuning"]
        reached = warm * 8 // 50
        if reached > np.floor(ended.epoch.max()):
            assert np.floor(fresh.epoch.max()) == reached
        else:
            assert set(fresh.stage) == {"tuning"}
    assert "tuning_continued" in set(found.stage)


def test_a_control_below_a_skipped_stretch_of_tuning():
    """Tuning lengths share a stage that ends by accuracy in its first stretch; the control goes on from there."""
    study = tiny.study(
        warm_start_epochs=(0, 20),
        pretraining_fraction=1.0,
        tuning_epochs=(18, 20),
        stage_accuracy=0.6,
        learning_rate=0.02,
    )
    found = tiny.trained(study)
    assert "tuning_continued" in set(found.stage)
    assert found.groupby("trial").tail(1).fit_accuracy.notna().all()


def test_the_equal_updates_gap_of_an_arm_does_not_depend_on_other_arms():
    def gap(*lengths: int) -> float:
        study = tiny.study(warm_start_epochs=(0, *lengths), eval_every=5, tuning_epochs=12, metric_epochs=4, seeds=3)
        setting = settings.Setting(
            study.swept,
            tuple({"arm": a.arm, **a.values} for a in study.arms),
            {a.arm: a.fresh for a in study.arms},
            4,
            True,
            5,
        )
        rows = summaries.summary(tiny.trained(study), setting)
        return next(row["gap_equal_updates"] for row in rows if row["warm_start_epochs"] == 4)

    assert gap(4) == gap(4, 30) == gap(4, 6, 9)
