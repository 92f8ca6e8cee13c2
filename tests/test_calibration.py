"""The form of a program: the rule's table, what is refused, and choosing by measuring within a bound."""

import dataclasses
import json
import math

import jax
import pytest

from plastic_jax import backend
from plastic_jax.data import DatasetSpec
from plastic_jax.data import spec as spec_of
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form, library
from plastic_jax.running import dry_run
from plastic_jax.study import plan, trial
from plastic_jax.study.config import Config, Sweep
from plastic_jax.train import calibration, costs
from plastic_jax.train.choice import candidates, formulation
from plastic_jax.train.trial_axis import Formulation

SMALL = Config(model="mlp", width=8, depth=1, norm="none", batch_size=8)
NARROW = Config(model="resnet", width=2, depth=1, batch_size=8)
SPEC = DatasetSpec("noise", 50, 30, (4, 4, 1), 5)
AUTO = Sweep.of({})
MUCH = 1e30  # FLOPs
GIB = 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLASTIC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "SECONDS", 0.01)


def rule(point, kind, leaves, **given):
    return candidates(Sweep.of(given), point, kind, leaves)[0]


def sized(form, point, leaves, memory=80 * GIB, devices=1, of="cifar10", **given):
    cost = costs.costs(point, spec_of(of))
    return formulation(form, Sweep.of(given), cost, leaves=leaves, memory=memory, devices=devices)


# The rule


@pytest.mark.parametrize("kind", ["gpu", "tpu", "accelerator"])
@pytest.mark.parametrize(
    ("width", "blocks"),
    [
        # (block, group) for 1, 3, 10, 50 and 200 trials: 128 channels side by side, four groups or five.
        (8, [(1, 1), (3, 3), (10, 10), (52, 13), (52, 13)]),
        (16, [(1, 1), (3, 3), (10, 5), (28, 7), (40, 8)]),
        (32, [(1, 1), (3, 3), (12, 4), (20, 4), (20, 4)]),
        (64, [(1, 1), (3, 1), (5, 1), (5, 1), (4, 1)]),
        (128, [(1, 1), (3, 1), (5, 1), (5, 1), (4, 1)]),
    ],
)
def test_resnets_are_packed_on_accelerators(kind, width, blocks):
    for leaves, (block, group) in zip((1, 3, 10, 50, 200), blocks, strict=True):
        assert rule(Config(width=width), kind, leaves) == Form("packed", block, group)


@pytest.mark.parametrize("kind", ["gpu", "tpu", "accelerator"])
def test_mlps_are_one_block_of_up_to_256_on_accelerators(kind):
    point = Config(model="mlp")
    for leaves, block in ((1, 1), (3, 3), (10, 10), (50, 50), (200, 200), (256, 256), (257, 129), (1000, 250)):
        assert rule(point, kind, leaves) == Form("packed", block)


@pytest.mark.parametrize("leaves", [1, 3, 10, 50, 200])
def test_on_a_cpu_trials_go_one_after_another(leaves):
    for width in (8, 16, 32, 64, 128):
        assert rule(Config(width=width), "cpu", leaves) == Form("native" if library.available() else "products")
    assert rule(Config(model="mlp"), "cpu", leaves) == Form("mapped")


@pytest.mark.parametrize("width", [2, 5, 8, 16, 32, 48, 64, 128])
@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 7, 10, 17, 31, 50, 64, 100, 200])
def test_few_slots_stay_idle(width, leaves):
    """Every trial has a slot, and the last block lacks at most one trial a group in each block before it."""
    form = rule(Config(width=width), "gpu", leaves)
    blocks = math.ceil(leaves / form.block)
    assert form.group * width <= max(128, width)
    assert form.block // form.group <= 5
    assert 0 <= blocks * form.block - leaves < blocks * max(form.group, form.block // form.group)
    assert sized(form, Config(width=width), leaves, memory=10_000 * GIB).slots == blocks * form.block


def test_candidates_on_a_gpu_have_64_128_or_256_channels_side_by_side():
    found = candidates(AUTO, Config(width=8), "gpu", 256)
    assert [str(form) for form in found] == [
        "packed(4x16)", "packed(1x16)", "packed(8x16)", "packed(4x8)", "packed(4x32)", "mapped",
    ]  # fmt: skip
    assert {form.group for form in candidates(AUTO, Config(width=64), "gpu", 64)} == {1}
    assert [form.block for form in candidates(AUTO, Config(model="mlp"), "gpu", 2048)] == [256, 32, 1024, 1]
    # A block of one trial is no candidate beside the mapped form.
    assert candidates(AUTO, Config(width=64), "gpu", 1) == (Form("packed"), Form("mapped"))


def test_candidates_of_every_backend_are_formulations():
    for kind in ("cpu", "gpu", "tpu"):
        for point in (Config(model="mlp"), Config(width=8), Config()):
            found = candidates(AUTO, point, kind, 100, measured=True)
            assert len(set(map(str, found))) == len(found) > 1
            for form in found:
                whole = sized(form, point, 100, devices=2)
                assert whole.slots % (whole.block * whole.devices(2)) == 0
                assert whole.form == form


def test_a_cpu_without_a_compiler_has_products(monkeypatch):
    monkeypatch.setattr(library, "available", lambda: False)
    assert candidates(AUTO, NARROW, "cpu", 9, measured=True) == (Form("products"),)
    assert Form("native") not in candidates(AUTO, SMALL, "cpu", 9, measured=True)


# What the user sets


@pytest.mark.parametrize(
    ("given", "width", "leaves", "form"),
    [
        ({"kernels": "mapped"}, 8, 50, Form("mapped")),
        ({"kernels": "packed", "block": 6}, 8, 50, Form("packed", 6, 6)),
        ({"block": 48}, 8, 50, Form("packed", 48, 16)),
        ({"block": 8}, 8, 3, Form("packed", 8, 8)),
        ({"block": 8}, 64, 50, Form("packed", 8, 1)),
        ({"group": 2}, 64, 10, Form("packed", 10, 2)),
        ({"group": 4}, 8, 50, Form("packed", 20, 4)),
        ({"group": 1}, 8, 50, Form("packed", 5, 1)),
        ({"block": 12, "group": 3}, 8, 50, Form("packed", 12, 3)),
        ({"trials_per_device": 2}, 8, 50, Form("packed", 2, 2)),
        ({"trials_per_device": 2}, 64, 50, Form("packed", 2, 1)),
        ({"trials_per_device": 6}, 16, 50, Form("packed", 6, 6)),
    ],
)
def test_what_the_user_sets_is_kept_to(given, width, leaves, form):
    for kind in ("gpu", "tpu"):
        assert rule(Config(width=width), kind, leaves, **given) == form
    whole = sized(form, Config(width=width), leaves, **given)
    assert whole.form == form
    if "trials_per_device" in given:
        assert whole.slots == given["trials_per_device"]


def test_blocks_can_be_set_on_a_cpu_too():
    assert rule(Config(width=8), "cpu", 10, kernels="packed") == Form("packed", 10, 10)
    assert rule(Config(model="mlp"), "cpu", 10, block=5) == Form("packed", 5)
    assert rule(Config(width=8), "cpu", 10, kernels="products") == Form("products")


def test_a_set_form_is_taken_unmeasured():
    for given, form in (({"kernels": "mapped"}, Form("mapped")), ({"block": 4, "group": 2}, Form("packed", 4, 2))):
        choice = calibration.choose(Sweep.of(given), NARROW, SPEC, MUCH, "cpu", leaves=9, measure=True)
        assert (choice.form, choice.source, choice.milliseconds) == (form, "set", {})
        assert choice.why == f"{form}: set by {' and '.join(f'{k}={v}' for k, v in given.items())}."


@pytest.mark.parametrize(
    ("given", "model", "kind", "says"),
    [
        ({"block": 8, "group": 3}, "resnet", "gpu", "group=3 is not allowed with block=8"),
        ({"group": 2}, "mlp", "gpu", "group=2 is not allowed with model=mlp"),
        ({"kernels": "native", "block": 2}, "resnet", "cpu", "block=2 is not allowed with kernels=native"),
        ({"kernels": "mapped", "block": 2}, "mlp", "tpu", "block=2 is not allowed with kernels=mapped"),
        ({"kernels": "mapped", "group": 2}, "resnet", "gpu", "group=2 is not allowed with kernels=mapped"),
        ({"kernels": "native"}, "resnet", "gpu", "programs for gpu cannot call it"),
        ({"kernels": "products"}, "resnet", "gpu", "kernels=products is not allowed on gpu"),
        ({"block": 8, "trials_per_device": 4}, "mlp", "gpu", "block=8 is not allowed with trials_per_device=4"),
    ],
)
def test_forms_that_are_none_are_refused(given, model, kind, says):
    if given.get("kernels") == "native" and kind == "cpu" and not library.available():
        pytest.skip("there is no C++ compiler")
    with pytest.raises(InputError) as raised:
        candidates(Sweep.of(given), Config(model=model, width=8), kind, 50)
    said = str(raised.value)
    assert says in said and said.endswith(".") and "\n" not in said


# The memory


def test_a_block_that_the_memory_cannot_hold_becomes_smaller():
    narrow, wide = Config(width=8), Config(width=64)
    for point, form in ((narrow, Form("packed", 64, 16)), (wide, Form("packed", 4))):
        cost = costs.costs(point, spec_of("cifar10"))
        assert sized(form, point, 200).form == form
        needed = cost.device_bytes(form.block, form.block, form.group)
        less = sized(form, point, 200, memory=needed - 1)
        assert (less.block, less.group) == (form.block - form.group, form.group)
        one = cost.device_bytes(1, 1, 1)
        assert sized(form, point, 200, memory=one).form == Form("packed")
    # Less than one group: groups become smaller too, as long as the user has not set them.
    cost = costs.costs(narrow, spec_of("cifar10"))
    memory = cost.device_bytes(8, 8, 8)
    assert sized(Form("packed", 64, 16), narrow, 200, memory=memory).form == Form("packed", 8, 8)
    assert sized(Form("packed", 64, 16), narrow, 200, memory=memory, group=16).form == Form("packed", 16, 16)
    assert sized(Form("packed", 64, 16), narrow, 200, memory=memory, block=64).form == Form("packed", 64, 16)


def test_slots_are_what_the_memory_holds():
    point = Config(width=64)
    cost = costs.costs(point, spec_of("cifar10"))
    for blocks in (1, 2, 7):
        memory = cost.device_bytes(4 * blocks, 4)
        assert sized(Form("packed", 4), point, 200, memory=memory).slots == 4 * blocks
        assert sized(Form("packed", 4), point, 200, memory=memory, devices=3).slots == 3 * 4 * blocks
    assert sized(Form("packed", 4), point, 2, memory=80 * GIB, devices=8).slots == 8


# Choosing by measuring


def test_a_short_run_takes_the_rules_form_unmeasured():
    cpu = calibration.LONGER * calibration.BOUND["cpu"] * calibration.RATE["cpu"]
    for flops in (1.0, 0.99 * cpu):
        choice = calibration.choose(AUTO, SMALL, SPEC, flops, "cpu", leaves=9, measure=True)
        assert (choice.form, choice.source, choice.milliseconds) == (Form("mapped"), "rule", {})
        assert choice.why == "mapped: by rule, as measuring pays only in a run of about 600 s or more."
        assert choice.bound_seconds == 60
    assert not backend.cache().exists()


def test_a_device_that_is_not_there_is_planned_for_by_the_rule():
    choice = calibration.choose(AUTO, Config(width=8), SPEC, MUCH, "gpu", leaves=50, measure=True)
    assert (choice.form, choice.source, choice.bound_seconds) == (Form("packed", 52, 13), "rule", 120)
    assert choice.why == "packed(4x13): by rule, for a device that is not there."


def test_a_long_run_measures_once_and_remembers():
    first = calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True)
    assert first.source == "measured"
    found = candidates(AUTO, SMALL, "cpu", 9, measured=True)
    assert set(first.milliseconds) == set(map(str, found))
    assert all(0 < value < 1e3 for value in first.milliseconds.values())
    assert first.why.startswith(f"{first.form}: ")
    assert f"of {len(found)} candidates {len(found)} were measured" in first.why
    assert f"{first.milliseconds[str(first.form)]:.3g} ms a trial-step" in first.why
    again = calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=False)
    assert again == dataclasses.replace(first, source="remembered", why=again.why)
    assert "in an earlier run" in again.why
    other = calibration.choose(AUTO, SMALL.replace(width=9), SPEC, MUCH, "cpu", leaves=9, measure=False)
    assert (other.source, other.form) == ("to be measured", found[0])
    assert other.why == f"mapped: by rule; before training, {len(found)} candidates are measured for at most 60 s."


@pytest.mark.parametrize("damage", ["", "{", '{"milliseconds": {}}', '{"milliseconds": {"mapped": -1}}', "[1]"])
def test_a_damaged_memory_is_measured_anew(damage):
    calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True)
    (file,) = (backend.cache() / "calibration").iterdir()
    file.write_text(damage)
    assert calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True).source == "measured"
    assert json.loads(file.read_text())["milliseconds"]


def test_the_fastest_is_taken_only_where_it_is_clearly_faster():
    by_rule, other = Form("packed", 64, 16), Form("packed", 16, 16)
    for factor, taken in ((0.96, by_rule), (0.9, other), (1.5, by_rule)):
        assert calibration.best((by_rule, other), {str(by_rule): 1.0, str(other): factor}) == taken
    assert calibration.best((by_rule, other), {str(other): 1.0}) == other  # the rule's did not run
    assert calibration.best((by_rule, other), {}) == by_rule


@pytest.mark.parametrize("side_by_side", [False, True])
def test_packed_forms_are_measured_beside_mapped_ones(side_by_side):
    found = (Form("packed", 4), Form("packed", 3), Form("mapped"))
    measured = calibration.measure_all(SMALL, SPEC, found, side_by_side=side_by_side)
    assert list(measured) == ["packed(4x1)", "packed(3x1)", "mapped"]
    assert all(0 < value < 1e3 for value in measured.values())


def test_float64_is_measured_in_float64():
    """JAX's setting is a thread's own."""
    point = SMALL.replace(compute_dtype="float64")
    with jax.enable_x64(True):
        assert len(calibration.measure_all(point, SPEC, (Form("mapped"), Form("packed", 2)), side_by_side=True)) == 2


@pytest.mark.parametrize("side_by_side", [False, True])
def test_what_is_not_ready_in_time_is_dropped(side_by_side):
    assert calibration.measure_all(SMALL, SPEC, (Form("mapped"), Form("packed", 2)), 0.0, side_by_side) == {}


def test_a_run_goes_on_by_the_rule_where_nothing_was_ready(monkeypatch):
    monkeypatch.setitem(calibration.BOUND, "cpu", 1e-6)
    choice = calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True)
    assert (choice.form, choice.source, choice.milliseconds) == (Form("mapped"), "rule", {})
    assert choice.why.endswith("candidates was ready within 1e-06 s.")
    assert not (backend.cache() / "calibration").exists()


def test_trials_that_are_measured_really_train():
    """Steps are counted by the core itself."""
    dataset = calibration.synthetic(SPEC, 40)
    run = calibration.trainer(SMALL, dataset, Formulation("mapped", slots=4), jax.local_devices()[:2])
    counted = 0
    for epochs in (1, 1, 1, 4, 3):  # from epoch 3 to the multiple of 4, then to that of 3
        seconds, steps = calibration.train(run, epochs)
        assert seconds > 0
        counted += steps
        assert run.steps_done == counted
    assert counted == 4 * 6 * 5
    assert all(math.isfinite(r["train_loss"]) for records in run.records.values() for r in records)
    assert run.chunk_bytes() > 4 * costs.costs(SMALL, dataset.spec).state_bytes / 2


# What the plan says


def described(gib=80.0, **given):
    """Four trials as long as each other, on an accelerator that is not there."""
    sweep = Sweep.of({"warm_start_epochs": 0, "seeds": 4, "tuning_epochs": 2, "metric_epochs": 1} | given)
    specs = {"cifar10": spec_of("cifar10")}
    study = trial.study(sweep, specs, {"warm_start_epochs": 0})
    return dry_run.describe(study, plan.programs(study), specs, gib, imagined=True)


def test_the_plan_says_which_form_was_chosen_and_why():
    one = described()
    (program,) = one["programs"]
    assert program["calibration"] == {
        "source": "rule",
        "why": "packed(4x1): by rule, for a device that is not there.",
        "milliseconds": {},
        "bound_seconds": 120.0,
    }
    assert program["formulation"] == {"kernels": "packed", "block": 4, "group": 1, "slots": 4}
    said = dry_run.table_of(json.loads(json.dumps(one)))
    assert said.count("by rule") == 1
    assert said.splitlines()[-1] == "Form: packed(4x1): by rule, for a device that is not there."


def test_the_plan_says_what_its_flops_leave_out(monkeypatch):
    """Never 0 in silence: in plan.json for each program, in the table once."""
    assert "not known" not in dry_run.table_of(described(width=(8, 16)))
    known = costs.costs
    missing = ("ffi_call is not counted", "a while loop's body is counted once")
    monkeypatch.setattr(costs, "costs", lambda *given: dataclasses.replace(known(*given), unread=missing))
    found = described(width=(8, 16))
    assert [program["flops_leave_out"] for program in found["programs"]] == [list(missing)] * 2
    said = "FLOPs are not known in full: ffi_call is not counted; a while loop's body is counted once."
    assert dry_run.table_of(found).splitlines().count(said) == 1


def test_the_plan_says_that_the_memory_narrowed_the_form():
    cost = costs.costs(Config(), spec_of("cifar10"))
    (program,) = described(cost.device_bytes(2, 2) / GIB)["programs"]
    assert program["formulation"] == {"kernels": "packed", "block": 2, "group": 1, "slots": 2}
    assert program["calibration"]["why"] == (
        "packed(4x1): by rule, for a device that is not there; narrowed to packed(2x1), for the memory or the plan."
    )


def test_the_dry_run_says_it_for_each_program_where_they_differ():
    said = dry_run.table_of(described(width=(8, 64))).splitlines()
    assert said[-2:] == [
        "Form of program 1: packed(1x4): by rule, for a device that is not there.",
        "Form of program 2: packed(4x1): by rule, for a device that is not there.",
    ]
    same = dry_run.table_of(described(width=(8, 64), kernels="mapped")).splitlines()
    assert same[-1] == "Form: mapped: set by kernels=mapped."
