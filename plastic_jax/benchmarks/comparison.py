"""The throughput benchmark: one network's rows, begun, timed in turns and compared.

All rows train the same network on the same synthetic data and are timed in turns, round after round; PyTorch's rows in
processes of their own, one at a time, while JAX waits. A row's figure is the median over rounds, its spread the
smallest and largest. Rates of a large matrix product and of a copy, measured in the same rounds, are the yardsticks.
"""

import bisect
import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax import backend
from plastic_jax.benchmarks import compile_for, torch_ways
from plastic_jax.benchmarks.ways import BATCHES, OBVIOUS, ONE, SPECS, Row, rows_of, tf32, title, torch_work
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.models import MODELS
from plastic_jax.running.dry_run import device_memory
from plastic_jax.study.config import Config, Sweep
from plastic_jax.train import calibration, costs, trial_axis
from plastic_jax.train.choice import candidates
from plastic_jax.train.trial_axis import Formulation

ROUNDS = 5  # samples of a row
COMPILING = {"cpu": 1, "gpu": 8, "tpu": 8}
"""Rows that compile at a time: beside an accelerator there are cores to compile on; a CPU's are what is measured."""


def yardsticks(devices: Sequence[Any], dtype: str) -> dict[str, Callable[[], float]]:
    """Functions that measure FLOP/s of a large matrix product and bytes/s read and written, all devices together."""
    cpu = devices[0].platform == "cpu"
    over = trial_axis.mesh(devices)
    side, copied = (1024, 2**24) if cpu else (8192, 2**28)
    square = np.ones((len(devices), side, side), np.float32)
    matrices = trial_axis.sharded(square, over).astype(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    vectors = trial_axis.sharded(np.ones((len(devices), copied), np.float32), over)

    def spread(function: Callable, **options: Any) -> Callable:
        along = jax.sharding.PartitionSpec("trials")
        return jax.jit(jax.shard_map(function, mesh=over, in_specs=along, out_specs=along), **options)

    # In place, since memory fresh from the kernel has half the rate.
    multiply, negate = spread(lambda m: m @ m), spread(lambda v: -v, donate_argnums=0)

    def copy() -> None:
        nonlocal vectors
        vectors = negate(vectors)

    def rate(call: Callable[[], Any], amount: float) -> float:
        seconds = []  # the fastest of several is what the device can do
        for _ in range(6):
            begin = time.perf_counter()
            calls = [call() for _ in range(4)]
            jax.block_until_ready((calls, vectors))
            seconds.append(time.perf_counter() - begin)
        return 4 * amount / min(seconds)

    return {
        "matmul_flops": lambda: rate(lambda: multiply(matrices), 2 * side**3 * len(devices)),
        "copy_bytes": lambda: rate(copy, 2 * 4 * copied * len(devices)),
    }


def flops_check(point: Config) -> float | None:
    """FLOPs of one compiled training step over those of the step as it is written; None where it counts none."""
    lowered = compile_for.lowered_step(point, SPECS[point.model], Form("mapped"))
    found: Any = lowered.compile().cost_analysis()
    if not found or "flops" not in found:
        return None
    return found["flops"] / costs.costs(point, SPECS[point.model]).step_flops


def evaluation_share(point: Config, choice: Form, devices: Sequence[Any]) -> float:
    """Seconds of an evaluation over those that its forward FLOPs would take at the training step's rate."""
    spec, tests = SPECS[point.model], 2048
    slots = choice.block * len(devices)
    form = Formulation(choice.kernels, choice.block, choice.group, slots)
    few, many = (
        calibration.trainer(point, calibration.synthetic(spec, point.batch_size * BATCHES, count), form, devices)
        for count in (calibration.TESTS, tests)
    )
    for run in (few, many):
        calibration.train(run, 1)
    seconds = [(calibration.train(few, 1)[0], calibration.train(many, 1)[0]) for _ in range(ROUNDS)]
    step = statistics.median(quick for quick, _ in seconds) / BATCHES
    evaluation = statistics.median(long - quick for quick, long in seconds)
    cost = costs.costs(point, spec)
    return evaluation / (step * tests * cost.evaluation_flops / cost.step_flops)


def check(point: Config, trials: Sequence[int]) -> None:
    """Refuse trials that do not fit the device, and say how many would.

    Raises:
      InputError: too many trials.
    """
    memory, _ = device_memory(0.0)
    cost, devices = costs.costs(point, SPECS[point.model]), jax.local_device_count()
    for count in trials:
        each = -(-count // devices)
        if cost.device_bytes(each, 1) > memory:
            most = bisect.bisect_right(range(1, each), memory, key=lambda slots: cost.device_bytes(slots, 1)) * devices
            raise InputError(
                f"--config.trials={tuple(trials)} is not allowed: {count} trials of width {point.width} and batch "
                f"{point.batch_size} do not fit {devices} x {memory / 2**30:.1f} GiB; at most {most} do."
            )


def networks(given: dict[str, Any], gpu: bool) -> list[Config]:
    """The points to measure: the benchmark's own networks, with the fields that are given (not empty) instead.

    On a GPU each in float32 and in bfloat16, on a CPU in float32, unless `compute_dtype` is given.

    Raises:
      InputError: a value that is not allowed.
    """
    values = {name: value for name, value in given.items() if value not in ((), "", 0)}
    if gpu:
        values.setdefault("compute_dtype", ("float32", "bfloat16"))
    models = Sweep.of({"model": values.pop("model", MODELS.names)}).values["model"]
    mlp = dict(model="mlp", depth=2, norm="none", batch_size=128)
    resnet = dict(model="resnet", batch_size=128)
    own: list[dict[str, Any]] = [dict(mlp, width=100), dict(mlp, width=256), dict(resnet, width=8, batch_size=64)]
    own += [dict(resnet, width=width) for width in ((16, 32, 64) if gpu else (16,))]
    chosen = [network for network in own if network["model"] in models]
    found = [point for network in chosen for point in Sweep.of({**network, **values}).points()]
    if any(point.compute_dtype == "float64" for point in found):
        raise InputError("--config.compute_dtype=float64 is not allowed here: float32, bfloat16.")
    return list(dict.fromkeys(found))


def compare(
    point: Config, trials: Sequence[int], python: str | None, minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all rows for one network within so many minutes; what does not fit is left out and named.

    A program that compiles and a step that runs are not interrupted, only PyTorch's processes are.
    """
    devices, end = jax.local_devices(), time.monotonic() + 60 * minutes
    checked = flops_check(point)
    left_out = [] if python else ["PyTorch's rows (there is no PyTorch)"]
    several = -(-max(trials) // len(devices))
    found = candidates(Sweep.of({"model": point.model}), point, jax.default_backend(), several, measured=True)
    measured = calibration.measure_all(point, SPECS[point.model], found) if len(found) > 1 else {}
    chosen = calibration.best(found, measured)

    def ran(row: Row, action: Callable[[], None]) -> bool:
        try:
            action()
        except (RuntimeError, ValueError, OSError) as error:
            row.close()
            left_out.append(f"{row.name} ({(str(error).splitlines() or [type(error).__name__])[0][:120]})")
            return False
        return True

    wanted = rows_of(point, chosen, found, trials, python, devices)

    def begin(row: Row) -> None:
        left = end - 18 * minutes - time.monotonic()  # the rest of the time is for the samples
        if left < 0 and row is not wanted[0]:
            left_out.append(f"{row.name} (no time)")
        elif ran(row, lambda: row.begin(max(left, 1.0))):
            say(f"{title(point)}: {row.name}: ready after {row.first_step_seconds:.1f} s")

    try:
        with concurrent.futures.ThreadPoolExecutor(COMPILING[jax.default_backend()]) as pool:
            list(pool.map(begin, wanted))
        rows = [row for row in wanted if row.live and ran(row, row.measure)]
        sticks = yardsticks(devices, point.compute_dtype)
        rates: dict[str, list[float]] = {name: [] for name in sticks}
        for number in range(ROUNDS):
            if number > 1 and time.monotonic() > end:
                break
            rows = [row for row in rows if (number > 1 and time.monotonic() > end) or ran(row, row.sample)]
            for name, stick in sticks.items():
                rates[name].append(stick())
        seen = {name: statistics.median(values) for name, values in rates.items()}
        table = table_of(point, rows, seen)
    finally:
        for row in wanted:
            row.close()
    cost = costs.costs(point, SPECS[point.model])
    return {
        **{name: getattr(point, name) for name in ("model", "width", "depth", "batch_size", "compute_dtype")},
        "title": title(point),
        "step_flops": cost.step_flops,
        "padded_step_flops": cost.padded_step_flops,
        "traffic_bytes": cost.traffic_bytes,
        "compiled_flops_over_written": checked,
        "evaluation_over_forward_share": evaluation_share(point, chosen, devices) if time.monotonic() < end else None,
        "chosen": dataclasses.asdict(chosen),
        "calibration": measured,
        "rates": seen,
        "rates_spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "rows": table,
        "left_out": left_out,
        "compiling": COMPILING[jax.default_backend()],
        "device": backend.device(),
        "backend": jax.default_backend(),
        "tf32": tf32(),
        "pytorch_settings": torch_ways.settings(torch_work(point, devices[0].platform == "cpu")),
    }


def table_of(point: Config, rows: Sequence[Row], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Each row's figures. All rows compute in the point's dtype, so that ratios compare like with like."""
    cost = costs.costs(point, SPECS[point.model])
    times = {row.name: statistics.median(row.samples) for row in rows}
    torch = [t for name, t in times.items() if name.startswith("pytorch")]
    table = []
    for row in rows:
        assert row.live
        seconds = times[row.name]
        table.append(
            {
                "row": row.name,
                "trials": row.trials,
                "images_per_second": point.batch_size / seconds,
                "ms_per_trial_step": 1e3 * seconds,
                "spread_ms": [1e3 * min(row.samples), 1e3 * max(row.samples)],
                "samples": len(row.samples),
                "over_one_at_a_time": times[ONE] / seconds if ONE in times else None,
                "over_best_pytorch": min(torch) / seconds if torch else None,
                "over_obvious": times[OBVIOUS] / seconds if OBVIOUS in times else None,
                "of_matmul_rate": cost.padded_step_flops / seconds / rates["matmul_flops"],
                "of_memory_rate": cost.traffic_bytes / seconds / rates["copy_bytes"],
                "first_step_seconds": row.first_step_seconds,
                "program_bytes": row.live.program_bytes,
                "process_bytes": row.live.process_bytes and row.live.process_bytes(),
                "note": row.note,
            }
        )
    return table
