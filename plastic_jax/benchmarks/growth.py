"""How a chunk's time, memory and compilation grow with trials, steps, data, devices and depth."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plastic_jax.benchmarks.ways import SPECS, short, title
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import calibration
from plastic_jax.train.program import programs
from plastic_jax.train.trial_axis import Formulation

BLOCKS, EPOCHS, DEPTHS = (1, 2, 8), (2, 8, 32), (1, 2, 4)
BATCHES = (1, 4, 16)  # times what takes a third of a second on a CPU
REPEATS = 3


def growth(point: Config, choice: Form, devices: Sequence[Any], seconds: float = math.inf) -> dict[str, Any]:
    """Curves of [x, y] pairs; `exponents` are the slopes of log y against log x: 1 is linear.

    seconds_of_trials, seconds_of_steps, seconds_of_examples: a chunk's time; milliseconds_of_devices: of a trial-step;
    bytes_of_trials: what a device needs; compile_of_depth: seconds to trace and compile. Points for which `seconds`
    do not suffice are named in `left_out`.
    """
    block, end = choice.block, time.monotonic() + seconds
    whole = block * len(devices)
    batches = short(point, whole, devices, 0.3)

    def run(slots: int, batches: int, over: Sequence[Any] = devices, of: Config = point) -> Any:
        dataset = calibration.synthetic(SPECS[of.model], of.batch_size * batches)
        form = Formulation(choice.kernels, block, choice.group, slots)
        return calibration.trainer(of, dataset, form, over)

    def median(live: Any, epochs: int) -> float:
        calibration.train(live, epochs)  # compiles, and comes to a multiple of the epochs
        return statistics.median(calibration.train(live, epochs)[0] for _ in range(REPEATS))

    def trial_step(n: int) -> float:
        return 1e3 * median(run(whole, batches, devices[:n]), 2) / (2 * batches * whole)

    def compiling(depth: int) -> float:
        programs.cache_clear()  # one of these depths has been compiled above
        live = run(whole, batches, of=point.replace(depth=depth))
        begin = time.perf_counter()
        live.lower_chunk().compile()
        return time.perf_counter() - begin

    curves: dict[str, list[tuple[float, float]]] = {}
    left_out: list[str] = []

    def measure(name: str, xs: Sequence[int], of: Callable[[int], float], scale: int = 1) -> None:
        curves[name], took = [], 0.0
        for k, x in enumerate(xs):
            begin = time.monotonic()
            if begin + took * (x / xs[k - 1] if k else 0.0) > end:
                left_out.append(f"{name} from {x * scale} on")
                break
            curves[name].append((x * scale, of(x)))
            took = time.monotonic() - begin

    of_trials: dict[int, Any] = {}

    def trials(count: int) -> float:
        of_trials[count] = run(count, batches)
        return median(of_trials[count], 2)

    measure("seconds_of_trials", [whole * blocks for blocks in BLOCKS], trials)
    measure("bytes_of_trials", list(of_trials), lambda count: of_trials[count].chunk_bytes())
    measure("seconds_of_steps", EPOCHS, lambda e: median(of_trials[whole * BLOCKS[0]], e), batches)
    measure("seconds_of_examples", [batches * b for b in BATCHES], lambda b: median(run(whole, b), 1), point.batch_size)
    measure("milliseconds_of_devices", sorted({1, len(devices)}), trial_step)
    measure("compile_of_depth", DEPTHS, compiling)
    curves = {name: points for name, points in curves.items() if points}
    exponents = {}
    for name, points in curves.items():
        x, y = np.log(np.array(points, float)).T
        exponents[name] = float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else None
    return {"curves": curves, "exponents": exponents, "left_out": left_out, "title": title(point)}
