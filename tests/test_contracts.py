"""The contracts of a run, each with the equality that it names (docs/contracts.md)."""

import jax
import numpy as np
import pytest
import tiny
from compiler import needs_compiler

from plastic_jax.data import sampler
from plastic_jax.kernels import library
from plastic_jax.study import plan
from plastic_jax.train.trial_axis import Formulation


@pytest.fixture(scope="module")
def reference():
    return tiny.trained(tiny.study())


# 1. A trial's result is a function of its own config and seed alone.


@pytest.mark.parametrize("slots", [1, 7])
def test_batch_size_changes_nothing_when_mapped(reference, slots):
    tiny.same(reference, tiny.trained(tiny.study(), slots=slots))


# The slow ones are the other form of the same network, of which a faster test is always run.
PACKED = [pytest.param(n, marks=pytest.mark.slow) if n.endswith("own convolutions") else n for n in tiny.PACKED]


@pytest.mark.parametrize("name", PACKED)
def test_batch_size_and_neighbours_change_nothing_when_packed(name):
    changes, block, group = tiny.PACKED[name]
    form = dict(kernels="packed", block=block, group=group)
    whole = tiny.trained(tiny.study(seeds=3, **changes), slots=block, **form)
    tiny.same(whole, tiny.trained(tiny.study(seeds=3, **changes), slots=3 * block, **form))
    alone = tiny.trained(tiny.study(seeds=1, first_seed=1, **changes), slots=block, **form)
    tiny.same(whole[whole.seed == 1], alone)


def test_neighbours_change_nothing_when_mapped(reference):
    alone = tiny.trained(tiny.study(seeds=1, first_seed=1))
    tiny.same(reference[reference.seed == 1], alone)


def test_number_of_devices_changes_nothing(reference):
    tiny.same(reference, tiny.trained(tiny.study(), slots=8, devices=4))


@pytest.mark.parametrize("name", PACKED)
def test_number_of_devices_changes_nothing_when_packed(name):
    """From two devices on; XLA compiles a program for one device by other passes, which round otherwise."""
    changes, block, group = tiny.PACKED[name]
    form = dict(kernels="packed", block=block, group=group)
    two = tiny.trained(tiny.study(**changes), slots=2 * block, devices=2, **form)
    tiny.same(two, tiny.trained(tiny.study(**changes), slots=4 * block, devices=4, **form))


@pytest.mark.parametrize("name", ["mapped", *tiny.PACKED])
def test_resumed_equals_uninterrupted_at_every_chunk(name):
    changes, block, group = tiny.PACKED.get(name, ({}, 1, 1))
    study = tiny.study(**changes, stage_accuracy=0.5, keep="ends")
    formulation = Formulation("mapped" if name == "mapped" else "packed", block, group, max(4, block))
    (whole,) = tiny.programs(study, formulation)
    snapshots = [whole.snapshot()]
    while whole.step():
        snapshots.append(whole.snapshot())
    assert len(snapshots) > (8 if not changes else 2)
    for arrays, host in snapshots[1::4]:
        (again,) = tiny.programs(study, formulation)
        again.resume(arrays, host)
        while again.step():
            pass
        tiny.same(tiny.table(study, [whole]), tiny.table(study, [again]))


@needs_compiler
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_a_native_trial_changes_neither_with_its_neighbours_nor_when_resumed(model):
    """Neighbours, slots and devices at once; a ResNet's images go from 2x2 to 1x1, where it falls back."""
    small = dict(model=model, width=3, depth=1, warm_start_epochs=(0, 1), tuning_epochs=2, equal_updates=False)
    study, form = tiny.study(seeds=3, **small), Formulation("native", slots=4)
    (whole,) = tiny.programs(study, form, 2)
    whole.step()
    arrays, host = whole.snapshot()
    while whole.step():
        pass
    (again,) = tiny.programs(study, form, 2)
    again.resume(arrays, host)
    while again.step():
        pass
    table = tiny.table(study, [whole])
    tiny.same(table, tiny.table(study, [again]))
    alone = tiny.trained(tiny.study(seeds=1, first_seed=1, **small), slots=2, devices=2, kernels="native")
    tiny.same(table[table.seed == 1], alone)


def test_a_run_with_snapshots_equals_one_without(reference):
    study = tiny.study()
    (run,) = tiny.programs(study, Formulation("mapped", slots=4))
    while run.step():
        run.snapshot()
    tiny.same(reference, tiny.table(study, [run]))


# A ResNet's forms agree in float64 in test_packed.py (packed, mapped), test_native.py and test_convolution.py too.


@pytest.mark.parametrize("model", ["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def test_formulations_and_devices_agree_in_float64(model):
    """20 steps within 1e-10; the random draws bit for bit."""
    jax.config.update("jax_enable_x64", True)
    try:
        study = tiny.study(
            compute_dtype="float64", model=model, width=2, depth=1, warm_start_epochs=(0,), tuning_epochs=4,
            metric_epochs=1, batch_size=10, label_noise=0.3, seeds=2,
        )  # fmt: skip
        tables, draws = [], []
        ways = [(Formulation("mapped", slots=2), 1), (Formulation("packed", 4, 1, 16), 4)]
        ways += [(Formulation("packed", 4, 2, 8), 1)] * (model == "resnet") + [(Formulation("products", slots=4), 2)]
        ways += [(Formulation("native", slots=4), 2)] * library.available()
        for formulation, devices in ways:
            (run,) = tiny.programs(study, formulation, devices)
            run._deal()
            first = jax.device_get(run._state.params)
            slots = sorted((slot.node, i) for i, slot in enumerate(run.slots) if slot.node is not None)
            own = [i for _, i in slots]
            draws.append([leaf[own] for leaf in jax.tree.leaves(first)] + [run._sample_host.labels[own]])
            while run.step():
                pass
            tables.append(tiny.table(study, [run]))
        assert tables[0].step.max() == 20
        for other in draws[1:]:
            assert all((a == b).all() for a, b in zip(draws[0], other, strict=True))
        for other in tables[1:]:
            for name in ("train_loss", "test_loss"):
                np.testing.assert_allclose(tables[0][name], other[name], rtol=0, atol=1e-10)
    finally:
        jax.config.update("jax_enable_x64", False)


# 2. Paired seeds.


def test_arms_of_a_seed_share_initialisation_and_tuning_batches():
    study = tiny.study(warm_start_epochs=(0, 2), pretraining_fraction=(0.5, 0.8), seeds=1)
    (run,) = tiny.programs(study, Formulation("mapped", slots=4))
    orders, starts = [], []
    while True:
        run._deal()
        state = jax.device_get(run._state)
        for i, slot in enumerate(run.slots):
            if slot.node is not None and slot.epoch == 0:
                if run.nodes[slot.node].stage.name == "tuning":
                    orders.append(state.order[i].tolist())
                if run.nodes[slot.node].parent is None:
                    starts.append([leaf[i] for leaf in jax.tree.leaves(state.params)])
        if not run.step():
            break
    assert len(orders) == 3 and orders[0] == orders[1] == orders[2]
    assert len(starts) == 3
    for other in starts[1:]:
        assert all((a == b).all() for a, b in zip(starts[0], other, strict=True))


def test_an_epoch_order_is_drawn_over_examples_not_positions():
    """Another permutation and size give the same relative order of the examples both have."""
    n = 40
    permutations = [np.random.default_rng(k).permutation(n).astype(np.int32) for k in range(2)]
    sizes = (n, 25)
    orders = [
        np.asarray(sampler.epoch_order(np.uint32(3), np.int32(0), np.int32(2), p, np.int32(m)))[:m].tolist()
        for p, m in zip(permutations, sizes, strict=True)
    ]
    assert sorted(orders[1]) == sorted(permutations[1][:25].tolist())
    assert [x for x in orders[0] if x in orders[1]] == orders[1]


# 4. Common prefixes are trained once.


def test_sharing_a_prefix_changes_nothing(reference):
    for epochs in (2, 5):
        alone = tiny.trained(tiny.study(warm_start_epochs=(0, epochs), equal_updates=False))
        shared = reference[(reference.warm_start_epochs == epochs)]
        tiny.same(shared, alone[alone.warm_start_epochs == epochs])


def test_a_fork_shows_in_no_other_trials_rows():
    """Lengths 2 and 5, evaluations every 4 epochs: the longer trial has rows at 4 and 5, not at 2."""
    found = tiny.trained(tiny.study(eval_every=4))
    five = found[(found.warm_start_epochs == 5) & (found.stage == "pretraining") & (found.seed == 0)]
    assert np.floor(five.epoch).tolist() == [4, 5]
    alone = tiny.trained(tiny.study(eval_every=4, warm_start_epochs=(0, 5), equal_updates=False))
    tiny.same(found[found.warm_start_epochs == 5], alone[alone.warm_start_epochs == 5])


def test_the_plan_trains_ten_lengths_as_one_pretraining():
    lengths = (0, 1, 2, 5, 10, 20, 50, 100, 200, 350)
    study = tiny.study(warm_start_epochs=lengths, tuning_epochs=500, equal_updates=False, seeds=3)
    (program,) = plan.programs(study)
    per_seed = sampler.stage_steps(25, 350, 8) + 10 * sampler.stage_steps(50, 500, 8)
    assert program.shared_steps == 3 * per_seed
    separate = sum(sampler.stage_steps(25, e, 8) + sampler.stage_steps(50, 500, 8) for e in lengths)
    assert program.unshared_steps == 3 * separate


def test_a_schedule_that_depends_on_the_length_is_not_shared():
    study = tiny.study(schedule="cosine", equal_updates=False, seeds=1)
    (program,) = plan.programs(study)
    assert program.shared_steps == program.unshared_steps


# 5. No host work in a chunk, no recompilation.


@pytest.mark.parametrize(("kernels", "block"), [("mapped", 1), ("packed", 2)])
def test_dynamic_values_share_one_compiled_program(kernels, block):
    """Nor does a second run of the program compile anything, nor one that is resumed."""
    study = tiny.study(
        learning_rate=(0.001, 0.01), weight_decay=(0.05, 0.1), label_noise=(0.0, 0.2), pretraining_fraction=(0.4, 0.7),
        tuning_learning_rate_factor=(1.0, 3.0), warm_start_epochs=(0, 3), batch_stats=("carry", "restart"),
        seeds=1, equal_updates=False, width=7,  # a width of its own: no other test has compiled it
        schedule=("constant", "cosine"),
    )  # fmt: skip
    (run,) = tiny.programs(study, Formulation(kernels, block, 1, 4))
    compilations = []

    def heard(event: str, _: float, **more: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(heard)
    run.step()
    snapshot = run.snapshot()
    while run.step():
        pass
    (second,), (resumed,) = (tiny.programs(study, Formulation(kernels, block, 1, 4)) for _ in range(2))
    resumed.resume(*snapshot)
    for again in (second, resumed):
        for _ in range(3):  # from its start, and from the middle
            again.step()
    ours = [name for name in compilations if name in {"jit(chunk)", "jit(start)", "jit(place)", "jit(fit)"}]
    assert sorted(ours) == ["jit(chunk)", "jit(fit)", "jit(place)", "jit(start)"]


def test_nothing_is_transferred_unasked_when_a_chunk_is_called():
    (run,) = tiny.programs(tiny.study(seeds=1), Formulation("mapped", slots=4))
    run._deal()
    run._data = jax.device_get(run._data)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run._run_chunk()


def test_the_state_is_donated():
    (run,) = tiny.programs(tiny.study(seeds=1), Formulation("mapped", slots=4))
    run._deal()
    before = jax.tree.leaves(run._state)
    run._run_chunk()
    assert all(leaf.is_deleted() for leaf in before)


# 9. The control for training time.


def test_the_control_is_the_fresh_trial_trained_longer(reference):
    """Bit for bit a fresh trial with a longer tuning stage, up to the longest warm start's updates."""
    control = reference[(reference.warm_start_epochs == 0) & (reference.seed == 0)]
    updates = reference[(reference.warm_start_epochs == 5) & (reference.seed == 0)].step.max()
    epochs = int(updates) * 8 // 50
    assert np.floor(control.epoch.max()) == epochs == 6
    longer = tiny.trained(tiny.study(warm_start_epochs=(0,), tuning_epochs=epochs, seeds=1, equal_updates=False))
    a = control.drop(columns=["stage", "trial", "fit_accuracy"]).reset_index(drop=True)
    b = longer.drop(columns=["stage", "trial", "fit_accuracy"]).reset_index(drop=True)
    assert a.equals(b)


# 10. Equal trials are trained once.


def test_fields_without_effect_make_no_further_trial():
    study = tiny.study(
        warm_start_epochs=(0, 2), pretraining_fraction=(0.5, 0.8), reset_optimizer=(True, False), seeds=1
    )
    assert len(study.trials) == 1 + 2 * 2
    fresh = [arm for arm in study.arms if arm.fresh == arm.arm]
    assert len(fresh) == 1 and {arm.fresh for arm in study.arms} == {fresh[0].arm}
    assert fresh[0].values["pretraining_fraction"] is None


def test_the_fresh_arm_is_always_there():
    study = tiny.study(warm_start_epochs=(5,), optimizer=("adam", "sgd"))
    assert sorted(arm.arm for arm in study.arms if arm.fresh == arm.arm) == [
        "optimizer=adam, warm_start_epochs=0",
        "optimizer=sgd, warm_start_epochs=0",
    ]
    assert len(plan.programs(study)) == 2


def test_restarted_and_carried_statistics_and_optimiser_states_differ():
    found = tiny.trained(
        tiny.study(warm_start_epochs=(0, 3), batch_stats=("carry", "restart"), reset_optimizer=(True, False), seeds=1)
    )
    tuning = found[(found.stage == "tuning") & (found.warm_start_epochs == 3)]
    first = tuning.groupby("arm").head(1)
    assert len(first) == 4
    losses = first.set_index(["batch_stats", "reset_optimizer"])
    # Training itself does not look at running statistics; evaluation does. The optimiser changes both.
    assert losses.loc[("carry", True)].train_loss == losses.loc[("restart", True)].train_loss
    assert losses.loc[("carry", True)].test_loss != losses.loc[("restart", True)].test_loss
    assert losses.loc[("carry", True)].train_loss != losses.loc[("carry", False)].train_loss


def test_no_row_is_lost_or_doubled(reference):
    assert not reference.duplicated(["trial", "stage", "step"]).any()
    for (epochs, _), rows in reference.groupby(["warm_start_epochs", "seed"]):
        stages = rows.groupby("stage").size().to_dict()
        assert stages["tuning"] == 4
        assert stages.get("pretraining", 0) == epochs


def test_train_figures_are_means_over_the_epochs_own_batches(reference):
    """With one epoch between evaluations, the counts of examples add up to the whole."""
    rows = reference[(reference.warm_start_epochs == 0) & (reference.seed == 0) & (reference.stage == "tuning")]
    for (_, row), before in zip(rows.iterrows(), [0, *rows.step[:-1]], strict=True):
        examples = (row.step - before) * 8
        correct = row.train_accuracy * examples
        assert abs(correct - round(correct)) < 1e-4


def test_snapshot_arrays_are_the_runs_own(reference):
    """A snapshot does not change while the run goes on (donated buffers)."""
    (run,) = tiny.programs(tiny.study(), Formulation("mapped", slots=4))
    for _ in range(3):
        run.step()
    arrays, _ = run.snapshot()
    copies = [a.copy() for a in arrays["state"].values()]
    while run.step():
        pass
    assert all((a == b).all() for a, b in zip(copies, arrays["state"].values(), strict=True))
