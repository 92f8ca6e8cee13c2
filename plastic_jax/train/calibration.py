"""Choosing a program's formulation by measuring, before its first step.

The candidates of `choice.candidates` train a synthetic data set of the program's shapes in turns, and the fastest
is taken if it is clearly faster than the one that the rule names. What was measured is remembered in the user's cache
folder, by device, versions, model and shapes. Measuring is bounded in time; where a run is not ten times longer than
that, the rule decides.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import statistics
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plastic_jax import backend
from plastic_jax.data import Dataset, DatasetSpec
from plastic_jax.kernels import Form
from plastic_jax.study import plan, trial
from plastic_jax.study.config import Config, Sweep, static_fields
from plastic_jax.train.choice import candidates
from plastic_jax.train.program import ProgramRun
from plastic_jax.train.trial_axis import Formulation

BOUND = {"cpu": 60.0}
"""Seconds that measuring may take, compiling included; elsewhere `BOUND_ELSEWHERE`.

A candidate that is not ready by then is dropped. What compiles at that moment is not interrupted: on a CPU it is waited
for, on an accelerator the run begins without it.
"""
BOUND_ELSEWHERE = 120.0
RATE = {"cpu": 3e10}
"""FLOPs a second that a run may do, to guess how long it will be; elsewhere `RATE_ELSEWHERE`."""
RATE_ELSEWHERE = 1e13
LONGER = 10
"""How many times longer than the bound a run must be for measuring to pay."""
COMPILING = 8
"""Candidates that are compiled side by side."""
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
    why: str
    """In a sentence."""
    milliseconds: dict[str, float]
    bound_seconds: float
    """What measuring may take."""

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return {key: value for key, value in vars(self).items() if key != "form"}


def choose(
    sweep: Sweep, point: Config, spec: DatasetSpec, flops: float, kind: str, *, leaves: int, measure: bool
) -> Choice:
    """The form for a program of so many `flops` on the devices at hand.

    Args:
      sweep: its kernels, block and group are kept to.
      point: the program's static values.
      spec: sizes of its data set.
      flops: what all of the program computes.
      leaves: trials that can be trained side by side on a device.
      kind: the backend, as `jax.default_backend()`; another one is planned for by the rule.
      measure: whether to measure what is not remembered; False for a dry run.
    """
    bound = BOUND.get(kind, BOUND_ELSEWHERE)
    long = flops >= LONGER * bound * RATE.get(kind, RATE_ELSEWHERE)
    here = kind == jax.default_backend()
    found = candidates(sweep, point, kind, leaves, long and here)
    rule = found[0]

    def choice(form: Form, source: str, why: str, milliseconds: dict[str, float] | None = None) -> Choice:
        return Choice(form, source, f"{form}: {why}.", milliseconds or {}, bound)

    given = [f"{name}={getattr(sweep, name)}" for name in ("kernels", "block", "group") if _is_set(sweep, name)]
    if len(found) == 1:
        return choice(rule, "set", f"set by {' and '.join(given)}") if given else choice(rule, "rule", "all there is")
    if not here:
        return choice(rule, "rule", "by rule, for a device that is not there")
    if not long:
        return choice(rule, "rule", f"by rule, as measuring pays only in a run of about {LONGER * bound:g} s or more")
    file = backend.cache() / "calibration" / f"{_key(point, spec, found)}.json"
    times, source = _read(file, found), "remembered"
    if not times and not measure:
        why = f"by rule; before training, {len(found)} candidates are measured for at most {bound:g} s"
        return choice(rule, "to be measured", why)
    if not times:
        times, source = measure_all(point, spec, found, bound), "measured"
        if not times:
            return choice(rule, "rule", f"by rule, as none of {len(found)} candidates was ready within {bound:g} s")
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason not to train
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_suffix(f".{os.getpid()}")  # other runs may be saving the same
            own.write_text(json.dumps({"device": backend.device(), "milliseconds": times}))
            own.replace(file)
    form = best(found, times)
    return choice(form, source, _compared(form, found, times, source), times)


def _is_set(sweep: Sweep, name: str) -> bool:
    return getattr(sweep, name) not in ("auto", 0)


def _compared(form: Form, found: Sequence[Form], times: dict[str, float], source: str) -> str:
    """Why that form was taken, from what was measured."""
    earlier = " in an earlier run" if source == "remembered" else ""
    measured = f"of {len(found)} candidates {len(times)} were measured{earlier}"
    rule = str(found[0])
    if form == found[0]:
        return f"by rule, and none is clearly faster ({times[rule]:.3g} ms a trial-step; {measured})"
    beside = f"{times[rule]:.3g} by the rule's {rule}" if rule in times else f"the rule's {rule} could not be measured"
    return f"the fastest ({times[str(form)]:.3g} ms a trial-step, {beside}; {measured})"


def best(found: Sequence[Form], milliseconds: dict[str, float]) -> Form:
    """The fastest, or the first one where no other is clearly faster."""
    ran = [c for c in found if str(c) in milliseconds] or [found[0]]
    fastest = min(ran, key=lambda c: milliseconds.get(str(c), math.inf))
    rule = milliseconds.get(str(found[0]), math.inf)
    return fastest if milliseconds.get(str(fastest), math.inf) < CLEARLY * rule else found[0]


def _key(point: Config, spec: DatasetSpec, found: Sequence[Form]) -> str:
    values = {name: getattr(point, name) for name in static_fields() if name not in _UNMEASURED}
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
    values = {name: getattr(point, name) for name in static_fields()}
    values |= dict(train_examples=0, validation_fraction=0.0, warm_start_epochs=0, tuning_epochs=longest)
    values |= dict(metric_epochs=1, seeds=form.slots, equal_updates=False, dataset=dataset.spec.name)
    study = trial.study(Sweep.of(values), {dataset.spec.name: dataset.spec}, {"warm_start_epochs": 0})
    (program,) = plan.programs(study)
    return ProgramRun(program, dataset, form, devices, 1)


def train(run: ProgramRun, epochs: int) -> tuple[float, int]:
    """Train all trials of a `trainer` to their next multiple of so many epochs: seconds, and the trial-steps taken."""
    run.schedule.eval_every = epochs
    before, begin = run.steps_done, time.perf_counter()
    run.step()
    run.flush()
    return time.perf_counter() - begin, run.steps_done - before


def measure_all(
    point: Config,
    spec: DatasetSpec,
    found: Sequence[Form],
    seconds: float = math.inf,
    side_by_side: bool | None = None,
) -> dict[str, float]:
    """Milliseconds a trial-step of each candidate that the device can run: medians of samples taken in turns.

    Args:
      point: the program's static values.
      spec: sizes of its data set.
      found: the candidates.
      seconds: what all of it may take; candidates that are not ready by then are left out.
      side_by_side: whether they are compiled in threads; by default on an accelerator, as a CPU's cores are measured.
    """
    end = time.monotonic() + seconds
    devices = jax.local_devices()
    dataset = synthetic(spec, _BATCHES * point.batch_size)
    together = max(c.block for c in found)  # the same number of trials for all

    def ready(c: Form) -> ProgramRun | None:
        form = Formulation(c.kernels, c.block, c.group, together // c.block * c.block * len(devices))
        if time.monotonic() > end:
            return None
        try:
            with jax.enable_x64(point.compute_dtype == "float64"):  # which is a thread's own
                run = trainer(point, dataset, form, devices)
                train(run, 1)  # compiles
        except RuntimeError:  # out of memory, or nothing that this backend compiles
            return None
        return run if time.monotonic() < end else None

    if not (devices[0].platform != "cpu" if side_by_side is None else side_by_side):
        runs = {c: run for c in found if (run := ready(c))}
    else:
        pool = concurrent.futures.ThreadPoolExecutor(COMPILING)
        begun = {pool.submit(ready, c): c for c in found}
        done = concurrent.futures.wait(begun, max(0.0, min(end - time.monotonic(), threading.TIMEOUT_MAX))).done
        pool.shutdown(wait=False, cancel_futures=True)  # what still compiles is left to end by itself
        runs = {begun[future]: run for future in begun if future in done and (run := future.result())}
    samples: dict[Form, list[float]] = {c: [] for c in runs}

    def sample(c: Form, epochs: int) -> float:
        took, steps = train(runs[c], epochs)
        samples[c].append(1e3 * took / steps)
        return took

    first = {c: sample(c, 1) for c in runs}
    for _ in range(ROUNDS):
        if time.monotonic() + sum(max(SECONDS, took) for took in first.values()) > end:
            break
        for c, took in first.items():
            sample(c, max(1, round(SECONDS / took)))
    return {str(c): round(statistics.median(several[1:] or several), 4) for c, several in samples.items()}
