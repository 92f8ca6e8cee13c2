"""The throughput benchmark: its rows, PyTorch's worker, its command."""

import dataclasses
import importlib.util
import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from experiments import warm_start
from plastic_jax.benchmarks import comparison, growth, report, torch_ways, ways
from plastic_jax.benchmarks.torch_worker import Work
from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.running import dry_run
from plastic_jax.study.config import Config
from plastic_jax.train import calibration, costs

SMALL = Config(model="mlp", width=8, depth=1, norm="none", batch_size=8)
SPEC = DatasetSpec("noise", 50, 30, (4, 4, 1), 5)
MAPPED = Form("mapped")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLASTIC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "SECONDS", 0.01)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(comparison, "ROUNDS", 2)
    monkeypatch.setattr(ways, "SECONDS", 0.01)
    monkeypatch.setattr(comparison, "yardsticks", lambda *_: {"matmul_flops": lambda: 1e11, "copy_bytes": lambda: 1e10})


def test_rows_report_rates_and_ratios(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "measure_all", lambda *_: {"mapped": 1.0})
    found = {**comparison.compare(SMALL, (4,), None, 3.0, lambda _: None), "figure_2_idle_share": None}
    rows = {row["row"]: row for row in found["rows"]}
    assert found["left_out"] == ["PyTorch's rows (there is no PyTorch)"]
    assert {ways.ONE, ways.OBVIOUS, "ours, mapped, one trial a device"} < set(rows)
    for row in rows.values():
        assert row["spread_ms"][0] <= row["ms_per_trial_step"] <= row["spread_ms"][1]
        assert row["images_per_second"] == pytest.approx(8e3 / row["ms_per_trial_step"])
        assert row["of_matmul_rate"] == pytest.approx(
            found["padded_step_flops"] / (row["ms_per_trial_step"] / 1e3) / 1e11
        )
        assert row["over_best_pytorch"] is None
        assert row["program_bytes"] > 1e5 and row["process_bytes"] is None  # the data alone are more
    assert rows["ours, mapped, one trial a device"]["trials"] == jax.local_device_count()
    assert rows[ways.ONE]["over_one_at_a_time"] == 1
    assert 1 <= found["compiled_flops_over_written"] < 1.2
    text = report.markdown(found)
    assert all(name in text for name in rows) and "Not all of PyTorch's" not in text
    lacking = {**found, "left_out": ["pytorch compiled, all cores (no time)"]}
    assert "Not all of PyTorch's ways were measured" in report.markdown(lacking)
    assert "stand idle" not in text
    assert "4.5 % of the slots" in report.markdown({**found, "figure_2_idle_share": 0.045})
    assert all(f"| {row['first_step_seconds']:.1f} s |" in text for row in rows.values())
    assert "the compiled step has" in text and "all rows compute in float32" in text
    curves = {"seconds_of_trials": [(2, 1.0), (4, 2.0)]}
    grown = {"curves": curves, "exponents": {"seconds_of_trials": 1.0}, "left_out": ["x from 8 on"], "title": "net"}
    whole = {"results": [found], "growth": grown, "left_out": ["another net"], "figure_2_flops": 1e18}
    report.write(whole, tmp_path)
    said = (tmp_path / "throughput.md").read_text()
    assert f"### {found['title']}\n" in said and "float32" in found["title"]
    assert "seconds of trials 1.00" in said and "x from 8 on" in said and "another net" in said
    assert (tmp_path / "throughput.png").stat().st_size > 100


def test_rows_that_compile_side_by_side_give_what_they_give_one_by_one(quick, monkeypatch):
    monkeypatch.setattr(ways, "SECONDS", 0.0)  # one epoch a sample
    monkeypatch.setattr(comparison, "evaluation_share", lambda *_: None)
    monkeypatch.setattr(comparison, "flops_check", lambda _: None)
    monkeypatch.setattr(calibration, "measure_all", lambda *_: {"mapped": 1.0})
    devices = jax.local_devices()[:2]

    def rows_of(*_):
        forms = ((MAPPED, devices), (MAPPED, devices[:1]), (Form("packed", 2), devices[:1]))
        ours = [ways.core_row(f"{form}, {len(on)}", SMALL, form, 2, on) for form, on in forms]
        return [*ours, ways.one_row(SMALL)]

    monkeypatch.setattr(comparison, "rows_of", rows_of)
    trainer, started, most = calibration.trainer, {}, []
    others = set(threading.enumerate())  # pools that JAX and Orbax keep from earlier tests

    def watched(point, dataset, form, devices):
        run = started[form, len(devices)] = trainer(point, dataset, form, devices)
        return run

    def begin(row, seconds):
        own = set(threading.enumerate()) - others
        most.append(sum(thread.name.startswith("ThreadPoolExecutor") for thread in own))
        real(row, seconds)

    real = ways.Row.begin
    monkeypatch.setattr(calibration, "trainer", watched)
    monkeypatch.setattr(ways.Row, "begin", begin)
    seen = []
    for together in (1, 4):
        monkeypatch.setitem(comparison.COMPILING, "cpu", together)
        found = comparison.compare(SMALL, (2,), None, 10.0, lambda _: None)
        rows = {row["row"]: (row["trials"], row["program_bytes"], row["samples"]) for row in found["rows"]}
        seen.append((rows, found["left_out"], {key: run.records for key, run in started.items()}, max(most)))
        started, most = {}, []
    (rows, left_out, records, alone), (rows_4, left_out_4, records_4, together) = seen
    assert (alone, together) == (1, 4)
    assert rows == rows_4 and len(rows) == 4 and left_out == left_out_4 == ["PyTorch's rows (there is no PyTorch)"]
    assert records == records_4 and all(records.values())  # losses and accuracies, to the bit


def test_every_row_compiles_anew(quick):
    """The choice has been compiled while it was measured; the row's time to compile must not be that of a look-up."""
    heard = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **more: heard.append((event.rpartition("/")[2], more.get("fun_name")))
    )
    row = ways.core_row("ours", SMALL, MAPPED, 2, jax.local_devices()[:2])
    for _ in range(2):
        heard.clear()
        row.begin(60.0)
        assert heard.count(("backend_compile_duration", "jit(chunk)")) == 1
        row.close()


def test_a_slow_row_takes_one_step_after_its_warm_up():
    taken = []

    def train(n):
        taken.append(n)
        return 100.0, 4 * n

    row = ways.Row("slow", 4, lambda _: ways.Live(train))
    row.begin(60.0)
    row.measure()
    row.sample()
    assert taken == [1] and row.samples == [25.0]
    assert row.note == "slow: 1 step(s) after warm-up, one sample"


def test_a_table_compares_one_dtype():
    assert {p.compute_dtype for p in comparison.networks({}, gpu=False)} == {"float32"}
    both = comparison.networks({"model": "resnet"}, gpu=True)
    assert len(both) == 2 * 4 and len({ways.title(p) for p in both}) == 8
    for point in both:
        found = torch_ways.ways(ways.torch_work(point, cpu=False), 1)
        assert {made.dtype for made, _ in found.values()} == {point.compute_dtype}
    (given,) = comparison.networks({"model": "resnet", "width": 8, "batch_size": 8, "compute_dtype": "bfloat16"}, False)
    assert ways.torch_work(given, cpu=True).dtype == "bfloat16"
    with pytest.raises(InputError, match="float64"):
        comparison.networks({"compute_dtype": "float64"}, gpu=False)


def test_the_rate_of_memory_is_measured_in_memory_that_is_there():
    """By counting: a page fresh from the kernel costs as much as reading and writing it."""
    copy = comparison.yardsticks(jax.local_devices()[:2], "float32")["copy_bytes"]
    copy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert copy() > 1e8
    # Of the 32768 pages that two devices read and write.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000


@pytest.mark.parametrize(("setting", "on"), [(None, True), ("tensorfloat32", True), ("highest", False)])
def test_tf32_is_set_alike_on_both_sides(setting, on):
    with jax.default_matmul_precision(setting):
        assert ways.torch_work(SMALL, cpu=False).tf32 == ways.tf32() == on


def test_hours_are_the_plans_flops_over_the_measured_rate():
    rows = [
        {"row": name, "ms_per_trial_step": ms} for name, ms in (("ours, a", 4.0), ("ours, b", 2.0), ("pytorch c", 8.0))
    ]
    found = {"model": "resnet", "rows": rows, "step_flops": 1e9, "title": "a net", "device": "2 x CPU"}
    ours, torch = report.device_hours(found, 3.6e18)
    assert (ours["row"], torch["row"]) == ("ours, b", "pytorch c")
    assert ours["hours"] == pytest.approx(3.6e18 / (1e9 / 2e-3) / 3600) == pytest.approx(torch["hours"] / 4)
    said = report.headline([found], 3.6e18)
    assert "extrapolated" in said and "from a net, on 2 x CPU: 2,000 h with our core (ours, b" in said
    assert report.headline([{**found, "model": "mlp"}], 3.6e18) == ""


def test_figure_2_is_the_dry_runs():
    """10 lengths, 4 optimisers, 5 seeds: docs/experiments.md says 16.6 EFLOP."""
    assert dry_run.flops(warm_start.PAPER, warm_start.EXPERIMENT.fresh) == pytest.approx(16.6e18, rel=3e-3)


def test_rows_that_fail_or_find_no_time_are_named(quick, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory\nand more")

    rows = [
        ways.one_row(SMALL),
        ways.Row("broken", 1, broken),
        ways.Row("fails later", 1, lambda _: ways.Live(broken)),
    ]
    monkeypatch.setattr(comparison, "rows_of", lambda *_: rows)
    monkeypatch.setattr(comparison, "evaluation_share", lambda *_: 1.0)
    found = comparison.compare(SMALL, (1,), "python", 3.0, lambda _: None)
    assert found["left_out"] == ["broken (out of memory)", "fails later (out of memory)"]
    found = comparison.compare(SMALL, (1,), "python", 0.0, lambda _: None)
    assert [row["row"] for row in found["rows"]] == [ways.ONE]  # the first one counts at any price
    assert found["left_out"] == ["broken (no time)", "fails later (no time)"]


@pytest.fixture
def small_growth(monkeypatch):
    # From two blocks a device on, since a loop over one needs no copies.
    values = {"BLOCKS": (2, 4), "EPOCHS": (1, 2), "BATCHES": (1, 2), "DEPTHS": (1, 2), "REPEATS": 1}
    for name, value in values.items():
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr(growth, "short", lambda *_: 2)


def test_growth_measures_every_curve(small_growth):
    found = growth.growth(SMALL, MAPPED, jax.local_devices()[:2])
    assert len(found["curves"]) == 6 and found["left_out"] == []
    assert all(len(points) == 2 and all(y > 0 for _, y in points) for points in found["curves"].values())
    assert set(found["exponents"]) == set(found["curves"])
    # Memory is counted, not timed: it grows with the trials, and no faster than they do.
    assert 0 < found["exponents"]["bytes_of_trials"] <= 1


def test_growth_ends_in_time_and_names_what_it_left_out(small_growth):
    found = growth.growth(SMALL, MAPPED, jax.local_devices()[:2], seconds=-1)
    assert found["curves"] == found["exponents"] == {}
    assert "seconds_of_steps from 2 on" in found["left_out"] and len(found["left_out"]) == 5
    assert "seconds_of_steps from 2 on" in report.growth_text(found)


def test_trials_that_cannot_fit_are_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(comparison, "device_memory", lambda _: (300 * 2**20, "as given"))
    with pytest.raises(InputError, match=r"4096 trials .* at most \d+ do"):
        comparison.check(Config(model="mlp", width=100), (1, 4096))


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
        ("--config.kernels=fast", "kernels"),
        ("--config.compute_dtype=float64", "float64"),
        ("--wokdir=x", "wokdir"),
    ],
)
def test_bad_input_is_one_sentence(argument, says, tmp_path):
    ended = command(argument, f"--workdir={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert says in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_it_measures_on_one_device_a_core(tmp_path):
    ended = command("--config.model=resnet", "--config.width=2048", "--config.trials=4096", f"--workdir={tmp_path}")
    assert ended.returncode == 2
    assert f"do not fit {len(os.sched_getaffinity(0))} x " in ended.stderr


def test_an_interpreter_without_pytorch_has_no_version():
    assert torch_ways.version("/nowhere/python") is None
    if importlib.util.find_spec("torch") is None:
        assert torch_ways.version(sys.executable) is None


def test_pytorchs_ways_differ_in_what_they_say():
    work = Work("mlp", 8, 1, "none", 8, "adam", (4, 4, 1), 5)
    found = torch_ways.ways(work, 2)
    assert len(found) == 4
    assert sum(processes * made.threads for made, processes in found.values()) == 8  # each takes both cores
    on_gpu = torch_ways.ways(dataclasses.replace(work, device="cuda"), 1)
    assert {(made.compiled, made.mode) for made, _ in on_gpu.values()} == {
        (False, "default"), (True, "reduce-overhead"), (True, "max-autotune"),
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the extra torch is not installed")
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_pytorchs_worker_trains_the_cores_network(model):
    from plastic_jax.benchmarks import torch_worker

    work = Work(model, 4, 2, "batch", 8, "adam", (8, 8, 3), 5)
    parameters = sum(p.numel() for p in torch_worker.network(work).parameters())
    point = Config(model=model, width=4, depth=2, norm="batch")
    assert parameters == costs.costs(point, DatasetSpec("noise", 50, 30, (8, 8, 3), 5)).parameters
    way = torch_ways.Way(sys.executable, work, 2, 120.0)
    try:
        seconds, steps = way.train(3)
        assert steps == 6 and seconds > 0 and way.peak_bytes() > 2**20
        assert all(math.isfinite(answer["loss"]) for answer in way.last)
    finally:
        way.close()


def test_a_worker_that_cannot_start_says_why():
    work = Work("mlp", 8, 1, "none", 8, "adam", (4, 4, 1), 5, device="nowhere")
    with pytest.raises(RuntimeError):
        torch_ways.Way(sys.executable, work, 1, 120.0)


def test_a_worker_that_hangs_is_ended_in_time(monkeypatch, tmp_path):
    work = Work("mlp", 8, 1, "none", 8, "adam", (4, 4, 1), 5)
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import os, subprocess, sys, time\n"
        f"helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'helper')!r}, 'w').write(str(helper.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(torch_ways, "_WORKER", hanging)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer within 3 s"):
        torch_ways.Way(sys.executable, work, 1, 3.0)
    assert time.monotonic() - begin < 60
    helper = int((tmp_path / "helper").read_text())
    for _ in range(100):  # what it had started ends with it
        state = Path(f"/proc/{helper}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the helper lives on")
