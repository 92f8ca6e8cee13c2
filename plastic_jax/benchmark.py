"""The throughput benchmark: our core in each formulation against what a user would run instead.

All rows train the same network on the same synthetic data and are timed in turns, round after round; PyTorch's rows in
processes of their own, one at a time, while JAX waits. A row's figure is the median over rounds, its spread the
smallest and largest. Rates of a large matrix product and of a copy, measured in the same rounds, are the yardsticks.
"""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax import backend, compile_for, torch_ways
from plastic_jax.benchmark_plain import plain_step
from plastic_jax.config import MODELS, Config, Sweep
from plastic_jax.data import DatasetSpec
from plastic_jax.dry_run import device_memory
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.torch_worker import Work
from plastic_jax.train import calibration, costs, trial_axis
from plastic_jax.train.choice import candidates
from plastic_jax.train.program import programs
from plastic_jax.train.state import resident
from plastic_jax.train.trial_axis import Formulation

SPECS = {
    "mlp": DatasetSpec("synthetic", 60_000, 10_000, (28, 28, 1), 10),  # as Fashion-MNIST
    "resnet": DatasetSpec("synthetic", 50_000, 10_000, (32, 32, 3), 10),  # as CIFAR-10
}
BATCHES = 16  # of the train set that is trained on
ROUNDS, SECONDS = 5, 0.5  # samples of a row, and how long each should take
COMPILING = 8  # rows that compile at a time, on an accelerator
SLOW = 5.0  # seconds a step from which on a row's one sample is one step after its warm-up
OBVIOUS, ONE = "jax, the obvious program", "jax, one trial at a time"


@dataclasses.dataclass
class Live:
    """A row that has compiled and taken its first step.

    `train(n)` trains for n steps (our core: n epochs) and gives seconds and trial-steps.
    """

    train: Callable[[int], tuple[float, int]]
    program_bytes: int | None = None  # JAX: what XLA plans for the program, all devices together
    process_bytes: Callable[[], int] | None = None  # PyTorch: the most that its processes have held
    ready: float | None = None  # seconds to compile and take the first step, where the row itself knows
    close: Callable[[], None] = lambda: None


@dataclasses.dataclass
class Row:
    """One way to train `trials` trials. `start(seconds)` may take so long."""

    name: str
    trials: int
    start: Callable[[float], Live]
    note: str = ""
    compile_seconds: float = 0.0
    n: int = 1
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a trial-step
    live: Live | None = None

    def begin(self, seconds: float) -> None:
        """Compile, and take the first step."""
        before = time.perf_counter()
        self.live = self.start(seconds)
        self.compile_seconds = self.live.ready or time.perf_counter() - before

    def measure(self) -> None:
        """Find how many steps a sample takes."""
        assert self.live
        took, steps = self.live.train(1)
        self.n = max(1, int(SECONDS / max(took, 1e-6)))
        if self.n > 1:
            self.live.train(self.n)  # a scan compiles for each number of steps
        elif took > SLOW:
            self.samples, self.note = [took / steps], f"slow: {steps // self.trials} step(s) after warm-up, one sample"
        elif steps <= self.trials:
            self.note = "slow: one step a sample"

    def sample(self) -> None:
        """Time some steps."""
        assert self.live
        if "one sample" in self.note:
            return
        seconds, steps = self.live.train(self.n)
        self.samples.append(seconds / steps)

    def close(self) -> None:
        """Let go of what it holds."""
        if self.live:
            self.live.close()
        self.live = None


def core_row(name: str, point: Config, choice: Form, trials: int, devices: Sequence[Any]) -> Row:
    """Our core with that formulation; as many whole blocks a device as `trials` fill, at least one."""
    slots = max(1, trials // (choice.block * len(devices))) * choice.block * min(len(devices), max(1, trials))

    def start(_: float) -> Live:
        programs.cache_clear()  # or it would not be compiled anew
        batches = 1 if _slow(point, choice, devices) else short(point, slots, devices, 2.0)
        dataset = calibration.synthetic(SPECS[point.model], point.batch_size * batches)
        form = Formulation(choice.kernels, choice.block, choice.group, slots)
        run = calibration.trainer(point, dataset, form, devices)
        calibration.train(run, 1)
        return Live(lambda epochs: calibration.train(run, epochs), run.chunk_bytes() * form.devices(len(devices)))

    return Row(name, slots, start)


def short(point: Config, slots: int, devices: Sequence[Any], seconds: float) -> int:
    """How many batches make an epoch of so long: BATCHES, but 1 to 64 on a CPU, from 100 GFLOP/s a core."""
    if devices[0].platform != "cpu":
        return BATCHES
    flops = costs.costs(point, SPECS[point.model]).step_flops * slots / len(devices)
    return int(np.clip(1e11 * seconds / flops, 1, 64))


def _slow(point: Config, choice: Form, devices: Sequence[Any]) -> bool:
    """Whether it has convolutions in XLA's slow layout inside a CPU's loop."""
    cpu = devices[0].platform == "cpu" and point.model == "resnet"
    return cpu and choice.kernels in ("packed", "mapped")


def obvious_row(point: Config, trials: int) -> Row:
    """A scan over steps of vmap over trials, of the network as Flax writes it and Optax's optimiser."""

    def start(_: float) -> Live:
        step, state, data = _plain(point)
        states = jax.vmap(state)(jnp.arange(trials))

        def many(states: Any, keys: jax.Array, data: Any) -> Any:
            return jax.lax.scan(lambda s, key: (jax.vmap(lambda one: step(one, key, data))(s), None), states, keys)[0]

        compiled = jax.jit(many, donate_argnums=0)

        def train(steps: int) -> tuple[float, int]:
            nonlocal states
            keys = jax.random.split(jax.random.key(steps), steps)
            begin = time.perf_counter()
            states = jax.block_until_ready(compiled(states, keys, data))
            return time.perf_counter() - begin, steps * trials

        train(1)
        keys = jax.random.split(jax.random.key(1), 1)
        return Live(train, trial_axis.planned_bytes(compiled.lower(states, keys, data)))

    return Row(OBVIOUS, trials, start)


def one_row(point: Config) -> Row:
    """A Python loop over a jitted step of one trial."""

    def start(_: float) -> Live:
        step, state, data = _plain(point)
        one = state(0)
        compiled = jax.jit(step, donate_argnums=0)

        def train(steps: int) -> tuple[float, int]:
            nonlocal one
            keys = list(jax.random.split(jax.random.key(steps), steps))
            begin = time.perf_counter()
            for key in keys:
                one = compiled(one, key, data)
            jax.block_until_ready(one)
            return time.perf_counter() - begin, steps

        train(1)
        return Live(train, trial_axis.planned_bytes(compiled.lower(one, jax.random.key(0), data)))

    return Row(ONE, 1, start)


def _plain(point: Config) -> tuple[Any, Any, Any]:
    """(step, state, data) of the plain program, on resident synthetic data."""
    spec = SPECS[point.model]
    data = jax.tree.map(jnp.asarray, resident(calibration.synthetic(spec, point.batch_size * BATCHES)))
    state, step = plain_step(point, data, spec.classes)
    return step, state, data


def torch_row(name: str, python: str, work: Work, processes: int) -> Row:
    """One of PyTorch's ways."""

    def start(seconds: float) -> Live:
        way = torch_ways.Way(python, work, processes, seconds)
        return Live(way.train, process_bytes=way.peak_bytes, ready=way.ready, close=way.close)

    return Row(name, processes, start)


def torch_work(point: Config, cpu: bool) -> Work:
    """PyTorch's work for that network, in the same dtype."""
    spec = SPECS[point.model]
    same = ("model", "width", "depth", "norm", "batch_size", "optimizer")
    sizes: Any = {name: getattr(point, name) for name in same}
    device = "cpu" if cpu else "cuda"
    return Work(**sizes, shape=spec.shape, classes=spec.classes, device=device, dtype=point.compute_dtype, tf32=tf32())


def tf32() -> bool:
    """Whether a GPU's float32 products may be TensorFloat-32: as JAX is set, and PyTorch after it."""
    return jax.config.jax_default_matmul_precision not in ("highest", "float32", "F32_F32_F32")  # pyright: ignore[reportAttributeAccessIssue]


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
    """FLOPs of one compiled training step as XLA counts them, over the closed form's; None where it counts none."""
    lowered = compile_for.lowered_step(point, SPECS[point.model], Form("mapped"))
    found: Any = lowered.compile().cost_analysis()
    if not found or "flops" not in found:
        return None
    return found["flops"] / costs.costs(point, SPECS[point.model]).step_flops


def evaluation_share(point: Config, choice: Form, devices: Sequence[Any]) -> float:
    """Seconds of an evaluation over those that its forward FLOPs would take at the training step's rate."""
    spec, tests = SPECS[point.model], 2048
    slots = choice.block * len(devices)
    form = Formulation(choice.trial_axis, choice.convolution, slots, choice.block)
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
        if cost.device_bytes(-(-count // devices), 1) > memory:
            most = max(0, int((memory - cost.dataset_bytes - cost.working_bytes) // cost.resident_bytes)) * devices
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
    models = Sweep.of({"model": values.pop("model", MODELS)}).values["model"]
    mlp = dict(model="mlp", depth=2, norm="none", batch_size=128)
    resnet = dict(model="resnet", batch_size=128)
    own: list[dict[str, Any]] = [dict(mlp, width=100), dict(mlp, width=256), dict(resnet, width=8, batch_size=64)]
    own += [dict(resnet, width=width) for width in ((16, 32, 64) if gpu else (16,))]
    chosen = [network for network in own if network["model"] in models]
    found = [point for network in chosen for point in Sweep.of({**network, **values}).points()]
    if any(point.compute_dtype == "float64" for point in found):
        raise InputError("--config.compute_dtype=float64 is not allowed here: float32, bfloat16.")
    return list(dict.fromkeys(found))


def rows_of(
    point: Config,
    chosen: Form,
    found: Sequence[Form],
    trials: Sequence[int],
    python: str | None,
    devices: Sequence[Any],
) -> list[Row]:
    """The rows for one network, the most telling first; `found`: what was chosen from."""
    cpu = devices[0].platform == "cpu"
    several = max(t for t in trials if t <= 16) if min(trials) <= 16 else min(trials)
    rows = [core_row(f"ours, as chosen ({chosen})", point, chosen, several, devices)]
    ways = torch_ways.ways(torch_work(point, cpu), len(devices)) if python else {}
    rows += [torch_row(name, str(python), *way) for name, way in ways.items()]
    # Compiling PyTorch's takes long: what every ratio needs comes first.
    rows = [r for r in rows if "compiled" not in r.name] + [one_row(point)] + [r for r in rows if "compiled" in r.name]
    others = [Form("packed", several, g) for g in _groups(point, several)] + [Form("mapped")]
    if cpu and point.model == "resnet":
        others.append(Form("products"))
    # On a CPU its convolutions take minutes a step.
    rows.append(obvious_row(point, 4 if cpu and point.model == "resnet" else several))
    rows += [core_row(f"ours, as chosen, up to {t} trials", point, chosen, t, devices) for t in trials if t != several]
    rows.append(core_row(f"ours, {chosen}, one device", point, chosen, max(several // 2, 1), devices[:1]))
    single = Form("mapped") if chosen.kernels == "packed" else chosen
    if len(devices) > 1:
        rows.append(core_row(f"ours, {single}, one trial a device", point, single, len(devices), devices))
    for other in dict.fromkeys([*found, *others]):
        if other != chosen:
            few = other.block * len(devices) if _slow(point, other, devices) else several
            rows.append(core_row(f"ours, {other}", point, other, few, devices))
    return rows


def _groups(point: Config, trials: int) -> list[int]:
    """Trials side by side in the channels: so many as divide the trials, up to 256 channels in the first module."""
    if point.model == "mlp":
        return [1]
    return [g for g in (1, 2, 4, 8, 16, 32) if trials % g == 0 and (g == 1 or g * point.width <= 256)]


def compare(
    point: Config, trials: Sequence[int], python: str | None, minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all rows for one network within so many minutes; what does not fit is left out and named.

    A program that compiles and a step that runs are not interrupted, only PyTorch's processes are.
    """
    devices, end = jax.local_devices(), time.monotonic() + 60 * minutes
    checked = flops_check(point)
    rows: list[Row] = []
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

    try:
        wanted = rows_of(point, chosen, found, trials, python, devices)

        def begin(row: Row) -> None:
            left = end - 18 * minutes - time.monotonic()  # the rest of the time is for the samples
            if left < 0 and row is not wanted[0]:
                left_out.append(f"{row.name} (no time)")
            elif ran(row, lambda: row.begin(max(left, 1.0))):
                say(f"{title(point)}: {row.name}: ready after {row.compile_seconds:.1f} s")

        # Beside an accelerator there are cores to compile on, side by side; a CPU's are those that are measured.
        together = 1 if devices[0].platform == "cpu" else COMPILING
        with concurrent.futures.ThreadPoolExecutor(together) as pool:
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
        for row in rows:
            row.close()
    cost = costs.costs(point, SPECS[point.model])
    return {
        **{name: getattr(point, name) for name in ("model", "width", "depth", "batch_size", "compute_dtype")},
        "title": title(point),
        "step_flops": cost.step_flops,
        "padded_step_flops": cost.padded_step_flops,
        "traffic_bytes": cost.traffic_bytes,
        "compiled_flops_over_closed_form": checked,
        "evaluation_over_forward_share": evaluation_share(point, chosen, devices) if time.monotonic() < end else None,
        "chosen": dataclasses.asdict(chosen),
        "calibration": measured,
        "rates": seen,
        "rates_spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "rows": table,
        "left_out": left_out,
        "device": backend.device(),
        "backend": jax.default_backend(),
        "tf32": tf32(),
        "pytorch_settings": torch_ways.settings(torch_work(point, devices[0].platform == "cpu")),
    }


def title(point: Config) -> str:
    """A network in words."""
    return f"{point.model}, width {point.width}, batch {point.batch_size}, {point.compute_dtype}"


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
                "compile_seconds": row.compile_seconds,
                "program_bytes": row.live.program_bytes,
                "process_bytes": row.live.process_bytes and row.live.process_bytes(),
                "note": row.note,
            }
        )
    return table
