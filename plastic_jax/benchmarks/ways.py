"""The rows of the throughput benchmark: ways to train some trials, our core in each form and what others would run."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax.benchmarks import torch_ways
from plastic_jax.benchmarks.plain import plain_step
from plastic_jax.benchmarks.torch_worker import Work
from plastic_jax.data import DatasetSpec
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import calibration, costs, trial_axis
from plastic_jax.train.program import programs
from plastic_jax.train.state import resident
from plastic_jax.train.trial_axis import Formulation

SPECS = {
    "mlp": DatasetSpec("synthetic", 60_000, 10_000, (28, 28, 1), 10),  # as Fashion-MNIST
    "resnet": DatasetSpec("synthetic", 50_000, 10_000, (32, 32, 3), 10),  # as CIFAR-10
}
BATCHES = 16  # of the train set that is trained on
SECONDS = 0.5  # how long a sample of a row should take
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
    first_step_seconds: float = 0.0  # compiling and the first step
    n: int = 1  # what `Live.train` is asked for in a sample
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a trial-step
    live: Live | None = None

    def begin(self, seconds: float) -> None:
        """Compile, and take the first step."""
        before = time.perf_counter()
        self.live = self.start(seconds)
        self.first_step_seconds = self.live.ready or time.perf_counter() - before

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
    """Our core in that form; as many whole blocks a device as `trials` fill, at least one."""
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


def title(point: Config) -> str:
    """A network in words."""
    return f"{point.model}, width {point.width}, batch {point.batch_size}, {point.compute_dtype}"


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
    single = Form("mapped") if chosen.kernels == "packed" else chosen
    if len(devices) > 1:
        rows.append(core_row(f"ours, {chosen}, one device", point, chosen, max(several // 2, 1), devices[:1]))
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
