"""Choosing a program's formulation by measuring, before its first step.

The candidates of `choice.candidates` train a synthetic data set of the program's shapes in turns, and the fastest
is taken if it is clearly faster than the one that the rule names. What was measured is remembered in the user's cache
folder, by device, versions, model and shapes. Where a run is too short for measuring to pay, the rule decides.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plastic_jax import backend, plan, trial
from plastic_jax.config import FIELDS, STATIC, Config, Sweep
from plastic_jax.data import Dataset, DatasetSpec
from plastic_jax.kernels import Form
from plastic_jax.train.choice import candidates
from plastic_jax.train.program import ProgramRun
from plastic_jax.train.trial_axis import Formulation

WORTH = {"cpu": 2e13}
"""FLOPs of a program from which on measuring pays: about ten minutes of two CPU cores; elsewhere `WORTH_ELSEWHERE`."""
WORTH_ELSEWHERE = 1e16
CLEARLY = 0.95
"""What another candidate's time must be below, in times of the rule's own, to be taken: less may be noise."""
SECONDS, ROUNDS = 0.4, 5  # of a sample, and samples of each candidate
_PACKAGE = Path(__file__).parents[1]
_PACE = ("kernels", "methods", "models", "train")  # the folders whose files set it
_BATCHES = 4  # of the synthetic train set
TESTS = 8
_UNMEASURED = ("dataset", "train_examples", "validation_fraction", "initialisation")  # do not set the pace


@dataclasses.dataclass(frozen=True)
class Choice:
    """The form taken, how (`set`, `rule`, `measured`, `remembered`, `to be measured`), and ms a trial-step."""

    form: Form
    source: str
    milliseconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return {"source": self.source, "milliseconds": self.milliseconds}


def choose(
    sweep: Sweep, point: Config, spec: DatasetSpec, flops: float, kind: str, *, leaves: int, measure: bool
) -> Choice:
    """The formulation for a program of so many `flops` on the devices at hand.

    Args:
      sweep: its kernels, block and group are kept to.
      point: the program's static values.
      spec: sizes of its data set.
      flops: what all of the program computes.
      leaves: trials that can be trained side by side on a device; wider blocks are no candidates, but for the rule's.
      kind: the backend, as `jax.default_backend()`; another one is planned for by the rule.
      measure: whether to measure what is not remembered; False for a dry run.
    """
    worth = flops >= WORTH.get(kind, WORTH_ELSEWHERE) and kind == jax.default_backend()
    rule, *others = candidates(sweep, point, kind, leaves, worth)
    found = (rule, *(c for c in others if c.block <= max(leaves, rule.block)))
    if len(found) == 1:
        return Choice(found[0], "rule" if sweep.kernels == "auto" else "set", {})
    if not worth:
        return Choice(found[0], "rule", {})
    file = backend.cache() / "calibration" / f"{_key(point, spec, found)}.json"
    remembered = _read(file, found)
    if remembered:
        return Choice(best(found, remembered), "remembered", remembered)
    if not measure:
        return Choice(found[0], "to be measured", {})
    measured = measure_all(point, spec, found)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason not to train
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")  # other runs may be saving the same
        own.write_text(json.dumps({"device": backend.device(), "milliseconds": measured}))
        own.replace(file)
    return Choice(best(found, measured), "measured", measured)


def best(found: Sequence[Form], milliseconds: dict[str, float]) -> Form:
    """The fastest, or the first one where no other is clearly faster."""
    ran = [c for c in found if str(c) in milliseconds] or [found[0]]
    fastest = min(ran, key=lambda c: milliseconds.get(str(c), math.inf))
    rule = milliseconds.get(str(found[0]), math.inf)
    return fastest if milliseconds.get(str(fastest), math.inf) < CLEARLY * rule else found[0]


def _key(point: Config, spec: DatasetSpec, found: Sequence[Form]) -> str:
    values = {name: getattr(point, name) for name in STATIC if name not in _UNMEASURED}
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    ours = [
        zlib.crc32(file.read_bytes())
        for folder in _PACE
        for file in sorted((_PACKAGE / folder).rglob("*"))
        if file.suffix in (".py", ".cc", ".h")
    ]
    where = [backend.device(), versions, ours, list(spec.shape), spec.classes, [str(c) for c in found]]
    return hashlib.sha256(json.dumps([values, where], sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Any, found: Sequence[Form]) -> dict[str, float]:
    """What was measured before; empty where nothing was, or where the file is damaged."""
    try:
        times = json.loads(file.read_text())["milliseconds"]
        held = {str(c): float(times[str(c)]) for c in found if str(c) in times}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return held if all(0 < value < float("inf") for value in held.values()) else {}


def synthetic(spec: DatasetSpec, examples: int, tests: int = TESTS) -> Dataset:
    """A data set of random bytes and labels with those shapes; [examples, H, W, C]."""
    random = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = random.integers(0, 256, (count, *spec.shape), dtype=np.uint8)
        return images, random.integers(0, spec.classes, count).astype(np.int32)

    sizes = dataclasses.replace(spec, train_examples=examples, test_examples=tests)
    return Dataset(sizes, *split(examples), *split(tests))


def trainer(point: Config, dataset: Dataset, form: Formulation, devices: Sequence[Any]) -> ProgramRun:
    """The core on that data set with as many fresh trials as slots, which do not end."""
    longest = (2**31 - 1 - point.batch_size) // len(dataset.train_labels) - 1
    values = {name: getattr(point, name) for name in FIELDS if FIELDS[name].metadata["kind"] == "static"}
    values |= dict(train_examples=0, validation_fraction=0.0, warm_start_epochs=0, tuning_epochs=longest)
    values |= dict(metric_epochs=1, seeds=form.slots, equal_updates=False, dataset=dataset.spec.name)
    study = trial.study(Sweep.of(values), {dataset.spec.name: dataset.spec}, {"warm_start_epochs": 0})
    (program,) = plan.programs(study)
    return ProgramRun(program, dataset, form, devices, 1)


def train(run: ProgramRun, epochs: int) -> tuple[float, int]:
    """Train all trials of a `trainer` to their next multiple of so many epochs: seconds, and the trial-steps taken."""
    run.eval_every = epochs
    before, begin = run.steps_done, time.perf_counter()
    run.step()
    run.flush()
    return time.perf_counter() - begin, run.steps_done - before


def measure_all(point: Config, spec: DatasetSpec, found: Sequence[Form]) -> dict[str, float]:
    """Milliseconds a trial-step of each candidate that the device can run: medians of samples taken in turns."""
    devices = jax.local_devices()
    dataset = synthetic(spec, _BATCHES * point.batch_size)
    together = max(c.block for c in found)  # the same number of trials for all
    runs, epochs = {}, {}
    for c in found:
        form = Formulation(c.kernels, c.block, c.group, together // c.block * c.block * len(devices))
        try:
            runs[c] = trainer(point, dataset, form, devices)
            train(runs[c], 1)  # compiles
            epochs[c] = max(1, round(SECONDS / train(runs[c], 1)[0]))
        except RuntimeError:  # out of memory, or nothing that this backend compiles
            runs.pop(c, None)
    samples: dict[Form, list[float]] = {c: [] for c in runs}
    for _ in range(ROUNDS):
        for c, run in runs.items():
            seconds, steps = train(run, epochs[c])
            samples[c].append(1e3 * seconds / steps)
    return {str(c): round(statistics.median(samples[c]), 4) for c in runs}
