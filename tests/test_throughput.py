"""Formulations chosen by measuring, and the benchmark: its rows, its worker, its command."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest

from plastic_jax import backend, benchmark, benchmark_report, calibration, costs, growth, torch_ways
from plastic_jax.config import Config, Sweep
from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.torch_worker import Work
from plastic_jax.trial_axis import BLOCKS, Candidate, Formulation, candidates, formulation

SMALL = Config(model="mlp", width=8, depth=1, norm="none", batch_size=8)
SPEC = DatasetSpec("noise", 50, 30, (4, 4, 1), 5)
AUTO = Sweep.of({"model": "mlp"})
MUCH = 1e30  # FLOPs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLASTIC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "SECONDS", 0.01)


def test_a_short_run_takes_the_rules_formulation_unmeasured():
    choice = calibration.choose(AUTO, SMALL, SPEC, 1.0, "cpu", leaves=9, measure=True)
    assert (choice.source, choice.milliseconds) == ("rule", {})
    assert choice.candidate == candidates(AUTO, "mlp", "cpu")[0]
    assert not backend.cache().exists()


def test_a_long_run_measures_once_and_remembers():
    first = calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True)
    assert first.source == "measured"
    assert set(first.milliseconds) == {str(c) for c in candidates(AUTO, "mlp", "cpu")}
    assert all(0 < value < 1e3 for value in first.milliseconds.values())
    again = calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=False)
    assert again == dataclasses.replace(first, source="remembered")
    other = calibration.choose(AUTO, dataclasses.replace(SMALL, width=9), SPEC, MUCH, "cpu", leaves=9, measure=False)
    assert (other.source, other.candidate) == ("to be measured", candidates(AUTO, "mlp", "cpu")[0])


@pytest.mark.parametrize("damage", ["", "{", '{"milliseconds": {}}', '{"milliseconds": {"map/plain": -1}}', "[1]"])
def test_a_damaged_memory_is_measured_anew(damage):
    calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True)
    (file,) = (backend.cache() / "calibration").iterdir()
    file.write_text(damage)
    assert calibration.choose(AUTO, SMALL, SPEC, MUCH, "cpu", leaves=9, measure=True).source == "measured"
    assert json.loads(file.read_text())["milliseconds"]


def test_the_fastest_is_taken_only_where_it_is_clearly_faster():
    rule, other = candidates(AUTO, "mlp", "cpu")
    for factor, taken in ((0.96, rule), (0.9, other), (1.5, rule)):
        assert calibration.best((rule, other), {str(rule): 1.0, str(other): factor}) == taken


def test_what_the_user_sets_is_kept_to():
    for axis in BLOCKS:
        sweep = Sweep.of({"model": "resnet", "trial_axis": axis, "convolution": "plain"})
        choice = calibration.choose(sweep, Config(width=2), SPEC, MUCH, "cpu", leaves=9, measure=True)
        assert (choice.candidate.trial_axis, choice.candidate.convolution) == (axis, "plain")
        assert choice.source == "set"


def test_candidates_of_every_backend_are_formulations():
    for kind in ("cpu", "gpu", "tpu"):
        for model in ("mlp", "resnet"):
            found = candidates(Sweep.of({"model": model}), model, kind)
            assert len(set(map(str, found))) == len(found) > 1
            for c in found:
                form = formulation(c, AUTO, model, costs.costs(SMALL, SPEC), leaves=100, memory=2**34, devices=2)
                assert form.slots % (form.block * form.devices(2)) == 0
                assert form.block == c.block


def test_the_benchmark_trains_what_it_times():
    """The rows' trials really move on: steps are counted by the core itself."""
    dataset = calibration.synthetic(SPEC, 40)
    run = calibration.trainer(SMALL, dataset, Formulation("map", "plain", 4), jax.local_devices()[:2])
    counted = 0
    for epochs in (1, 1, 1, 4, 3):  # from epoch 3 to the multiple of 4, then to that of 3
        seconds, steps = calibration.train(run, epochs)
        assert seconds > 0
        counted += steps
        assert run.steps_done == counted
    assert counted == 4 * 6 * 5
    assert all(math.isfinite(r["train_loss"]) for records in run.records.values() for r in records)
    assert run.chunk_bytes() > 4 * costs.costs(SMALL, dataset.spec).state_bytes / 2


def test_rows_report_rates_and_ratios(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "yardsticks", lambda *_: {"matmul_flops": lambda: 1e11, "copy_bytes": lambda: 1e10})
    found = benchmark.compare(SMALL, (1, 4), None, 3.0, lambda _: None)
    rows = {row["row"]: row for row in found["rows"]}
    assert found["left_out"] == []
    assert {benchmark.ONE, benchmark.OBVIOUS} < set(rows)
    for row in rows.values():
        assert row["spread_ms"][0] <= row["ms_per_trial_step"] <= row["spread_ms"][1]
        assert row["images_per_second"] == pytest.approx(8e3 / row["ms_per_trial_step"])
        assert row["of_matmul_rate"] == pytest.approx(
            found["padded_step_flops"] / (row["ms_per_trial_step"] / 1e3) / 1e11
        )
        assert row["over_best_pytorch"] is None
    assert rows[benchmark.ONE]["over_one_at_a_time"] == 1
    assert found["compiled_flops_over_closed_form"] == pytest.approx(1, abs=0.02)
    text = benchmark_report.markdown(found)
    assert all(name in text for name in rows)
    curves = {"seconds_of_trials": [(2, 1.0), (4, 2.0)]}
    grown = {"curves": curves, "exponents": {"seconds_of_trials": 1.0}}
    for path in benchmark_report.write([found], grown, tmp_path):
        assert path.stat().st_size > 100


def test_growth_measures_every_curve(monkeypatch):
    for name, values in (
        ("BLOCKS", (1, 2)),
        ("EPOCHS", (1, 2)),
        ("BATCHES", (2, 4)),
        ("DEPTHS", (1, 2)),
        ("REPEATS", 1),
    ):
        monkeypatch.setattr(growth, name, values)
    found = growth.growth(SMALL, Candidate("map", "plain", 1), jax.local_devices()[:2])
    assert all(len(points) == 2 and all(y > 0 for _, y in points) for points in found["curves"].values())
    assert set(found["exponents"]) == set(found["curves"])
    # Memory is counted, not timed: it grows with the trials, and no faster than they do.
    assert 0 < found["exponents"]["bytes_of_trials"] <= 1


def test_trials_that_cannot_fit_are_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(benchmark, "device_memory", lambda _: (300 * 2**20, "as given"))
    with pytest.raises(InputError, match=r"4096 trials .* at most \d+ do"):
        benchmark.check(Config(model="mlp", width=100), (1, 4096))


def command(*arguments):
    call = [sys.executable, "-m", "experiments.throughput", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.trials=0", "trials"),
        ("--config.trials=(1, 2.5)", "trials"),
        ("--config.minutes=-1.", "minutes"),
        ("--config.model=vit", "model"),
        ("--config.width=-3", "width"),
        ("--config.convolution=fast", "convolution"),
        ("--wokdir=x", "wokdir"),
    ],
)
def test_bad_input_is_one_sentence(argument, says, tmp_path):
    ended = command(argument, f"--workdir={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert says in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_pytorch_has_no_version():
    assert torch_ways.version("/nowhere/python") is None
    if importlib.util.find_spec("torch") is None:
        assert torch_ways.version(sys.executable) is None


def test_pytorchs_ways_differ_in_what_they_say():
    work = Work("mlp", 8, 1, "none", 8, "adam", (4, 4, 1), 5)
    found = torch_ways.ways(work, 2)
    assert len(found) == 4
    assert sum(processes * made.threads for made, processes in found.values()) == 8  # each takes both cores
    gpu = torch_ways.ways(dataclasses.replace(work, device="cuda"), 1)
    assert {made.dtype for made, _ in gpu.values()} == {"float32", "bfloat16"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the extra torch is not installed")
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_pytorchs_worker_trains_the_cores_network(model):
    from plastic_jax import models, torch_worker

    work = Work(model, 4, 2, "batch", 8, "adam", (8, 8, 3), 5)
    parameters = sum(p.numel() for p in torch_worker.network(work).parameters())
    assert parameters == models.parameters_count(model, width=4, depth=2, norm="batch", classes=5, shape_HWC=(8, 8, 3))
    way = torch_ways.Way(sys.executable, work, 2)
    try:
        seconds, steps = way.train(3)
        assert steps == 6 and seconds > 0 and way.peak_bytes() > 2**20
        assert all(math.isfinite(answer["loss"]) for answer in way.last)
    finally:
        way.close()


def test_a_worker_that_cannot_start_says_why():
    work = Work("mlp", 8, 1, "none", 8, "adam", (4, 4, 1), 5, device="nowhere")
    with pytest.raises(RuntimeError):
        torch_ways.Way(sys.executable, work, 1)
