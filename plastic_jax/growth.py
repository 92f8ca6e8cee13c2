"""How a chunk's time, memory and compilation grow with trials, steps, data, devices and depth."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from plastic_jax import calibration
from plastic_jax.benchmark import SPECS
from plastic_jax.config import Config
from plastic_jax.trial_axis import Candidate, Formulation

BLOCKS, EPOCHS, BATCHES, DEPTHS = (1, 2, 8), (2, 8, 32), (16, 64, 256), (1, 2, 4)
REPEATS = 3


def growth(point: Config, choice: Candidate, devices: Sequence[Any]) -> dict[str, Any]:
    """Curves of [x, y] pairs; `exponents` are the slopes of log y against log x: 1 is linear.

    seconds_of_trials, seconds_of_steps, seconds_of_examples: a chunk's time; milliseconds_of_devices: of a trial-step;
    bytes_of_trials: what a device needs; compile_of_depth: seconds to trace and compile.
    """
    block = choice.block
    whole = block * len(devices)

    def run(slots: int, batches: int, over: Sequence[Any] = devices, of: Config = point) -> Any:
        dataset = calibration.synthetic(SPECS[of.model], of.batch_size * batches)
        form = Formulation(choice.trial_axis, choice.convolution, slots, block)
        return calibration.trainer(of, dataset, form, over)

    def seconds(live: Any, epochs: int) -> float:
        calibration.train(live, epochs)  # compiles, and comes to a multiple of the epochs
        return statistics.median(calibration.train(live, epochs)[0] for _ in range(REPEATS))

    curves: dict[str, list[tuple[float, float]]] = {}
    counts = [whole * blocks for blocks in BLOCKS]
    of_trials = [run(t, BATCHES[0]) for t in counts]
    curves["seconds_of_trials"] = [(t, seconds(live, 2)) for t, live in zip(counts, of_trials, strict=True)]
    curves["bytes_of_trials"] = [(t, live.chunk_bytes()) for t, live in zip(counts, of_trials, strict=True)]
    live = of_trials[0]
    curves["seconds_of_steps"] = [(e * BATCHES[0], seconds(live, e)) for e in EPOCHS]
    curves["seconds_of_examples"] = [(b * point.batch_size, seconds(run(whole, b), 1)) for b in BATCHES]
    numbers = sorted({1, len(devices)})
    curves["milliseconds_of_devices"] = [
        (n, 1e3 * seconds(run(whole, BATCHES[0], devices[:n]), 2) / (2 * BATCHES[0] * whole)) for n in numbers
    ]
    curves["compile_of_depth"] = [
        (d, _compile_seconds(run(whole, BATCHES[0], of=dataclasses.replace(point, depth=d)))) for d in DEPTHS
    ]
    exponents = {}
    for name, points in curves.items():
        x, y = np.log(np.array(points, float)).T
        exponents[name] = float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else None
    return {"curves": curves, "exponents": exponents, "model": point.model, "width": point.width}


def _compile_seconds(live: Any) -> float:
    begin = time.perf_counter()
    live.lower_chunk().compile()
    return time.perf_counter() - begin
