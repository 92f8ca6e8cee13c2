"""Stages, trials and arms: what a point of the sweep means in terms of training.

A trial is a seed and a list of stages. Arms are the points of the sweep; trials that differ only in fields without
effect are one trial (contract 10), and the fresh arm of every combination is always there.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plastic_jax import sampler
from plastic_jax.config import FIELDS, STATIC, SWEPT_KINDS, Config, Sweep, canonical
from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError

PRETRAINING, TUNING, CONTINUED = "pretraining", "tuning", "tuning_continued"
# The stages' order streams; the tuning stage has its own, whatever comes before it (contract 2).
TUNING_STREAM, PRETRAINING_STREAM = 0, 1


NO_MIXTURE = -1.0
MOST_TRIALS = 100_000  # of a run: beyond, the table no longer fits the host


@dataclass(frozen=True)
class Stage:
    """A phase of training on the first `size` examples of the trial's permutation.

    It ends after `epochs`, or at the end of the first epoch whose train accuracy reaches `accuracy` (0: never early).
    What happens at its start: BatchNorm's statistics and the optimiser's state are restarted or carried.
    A smooth transition (`gamma` not NO_MIXTURE) draws its examples, with replacement, from the whole `size` or from
    the first `prefix`; an epoch is then as many examples as `size`.
    """

    name: str
    stream: int
    size: int
    epochs: int
    learning_rate: float
    weight_decay: float
    accuracy: float
    restart_batch_stats: bool
    reset_optimizer: bool
    prefix: int = 0
    gamma: float = NO_MIXTURE


@dataclass(frozen=True)
class Trial:
    """A seed and an arm's stages; `point` holds the static values and those that draw the train set."""

    trial: int
    arm: str
    seed: int
    point: Config
    stages: tuple[Stage, ...]

    @property
    def program(self) -> tuple[Any, ...]:
        """Trials with equal keys run in one compiled program."""
        return tuple(getattr(self.point, name) for name in STATIC)


@dataclass(frozen=True)
class Arm:
    """A point of the sweep: its name, its swept values (null: without effect), the name of its fresh arm."""

    arm: str
    values: Mapping[str, Any]
    fresh: str
    point: Config


@dataclass(frozen=True)
class Study:
    """A sweep spelled out: the swept fields, the arms in order, and all trials, arm by arm and seed by seed."""

    sweep: Sweep
    swept: tuple[str, ...]
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]


def stages(point: Config, size: int) -> tuple[Stage, ...]:
    """The stages of a point on a train set of `size` examples (paper, section 3)."""

    def stage(name: str, stream: int, members: int, epochs: int, factor: float, first: bool) -> Stage:
        if point.stage_accuracy and point.max_stage_epochs:
            epochs = min(epochs, point.max_stage_epochs)
        return Stage(
            name=name,
            stream=stream,
            size=members,
            epochs=epochs,
            learning_rate=point.learning_rate * factor,
            weight_decay=point.weight_decay,
            accuracy=point.stage_accuracy,
            restart_batch_stats=first or point.batch_stats == "restart",
            reset_optimizer=first or point.reset_optimizer,
        )

    smooth = point.transition == "smooth"
    warm = point.warm_start_epochs > 0 and not smooth
    subset = sampler.subset_size(size, point.pretraining_fraction)
    found = []
    if warm:
        found.append(stage(PRETRAINING, PRETRAINING_STREAM, subset, point.warm_start_epochs, 1.0, True))
    factor = point.tuning_learning_rate_factor
    tuning = stage(TUNING, TUNING_STREAM, size, point.tuning_epochs, factor, not warm)
    if smooth:
        tuning = dataclasses.replace(tuning, gamma=point.gamma, prefix=subset if point.gamma else size)
    return (*found, tuning)


def _check(point: Config, spec: DatasetSpec) -> None:
    """Refuse a point whose fields are each allowed but impossible together."""
    if point.transition == "smooth" and point.gamma >= 1:
        raise InputError(
            f"--config.gamma={point.gamma} is not allowed: a number from 0 to below 1 (with 1 the whole set is "
            "never drawn from)."
        )
    pool = spec.train_examples
    held = sampler.validation_size(pool, point.validation_fraction)
    size = sampler.train_size(pool, point.train_examples, point.validation_fraction)
    if size > pool - held:
        left = f"{pool - held} are left beside the validation set" if held else f"{spec.name} has {pool}"
        raise InputError(f"--config.train_examples={point.train_examples} is not allowed: {left}.")
    if size < 1:
        raise InputError(f"--config.validation_fraction={point.validation_fraction} leaves no train example of {pool}.")
    for stage in stages(point, size):
        if point.batch_size > stage.size:
            raise InputError(
                f"--config.batch_size={point.batch_size} is not allowed: the {stage.name} stage has "
                f"{stage.size} examples, and a batch holds at most so many."
            )
        if (stage.epochs + 1) * stage.size + point.batch_size > 2**31 - 1:
            raise InputError(
                f"--config: the {stage.name} stage of {stage.epochs} epochs of {stage.size} examples is too long: "
                f"at most {2**31 - 1} examples a stage."
            )


def _check_run(sweep: Sweep) -> None:
    """Refuse run fields that are impossible together with the swept ones."""
    if len(sweep.values["compute_dtype"]) > 1 and "float64" in sweep.values["compute_dtype"]:
        raise InputError(
            f"--config.compute_dtype={sweep.values['compute_dtype']} is not allowed: float64 stands alone in a run, "
            "since JAX then computes otherwise throughout."
        )
    shortest = min(sweep.values["tuning_epochs"])
    if any(sweep.values["stage_accuracy"]):
        shortest = min([shortest, *filter(None, sweep.values["max_stage_epochs"])])
    if sweep.metric_epochs > shortest:
        raise InputError(
            f"--config.metric_epochs={sweep.metric_epochs} is not allowed: the tuning stage has {shortest} epochs, "
            "and the metric averages over at most so many."
        )
    if sweep.equal_updates and any(s != "constant" for s in sweep.values["schedule"]):
        raise InputError(
            f"--config.schedule={sweep.values['schedule']} is not allowed with equal_updates=True: a fresh arm cannot "
            "be trained on past the end of its schedule; set --config.equal_updates=False."
        )
    if sweep.first_seed + sweep.seeds > 2**31 - 1:
        raise InputError(
            f"--config.seeds={sweep.seeds} is not allowed: seeds end at {2**31 - 2}, and the first is "
            f"{sweep.first_seed}."
        )


def _fresh(point: Config, fresh: Mapping[str, Any]) -> Config:
    return dataclasses.replace(point, **fresh)


def study(sweep: Sweep, specs: Mapping[str, DatasetSpec], fresh: Mapping[str, Any]) -> Study:
    """Spell a sweep out into arms and trials.

    Args:
      sweep: the checked fields.
      specs: the size of each data set named in the sweep.
      fresh: the fields that turn a point into its fresh arm, such as {"warm_start_epochs": 0}.

    Raises:
      InputError: fields that are impossible together, in one sentence.
    """
    _check_run(sweep)
    count = math.prod(len(values) for values in sweep.values.values()) * sweep.seeds
    if count > MOST_TRIALS:
        raise InputError(
            f"--config.seeds={sweep.seeds} is not allowed here: the sweep would have {count} trials, and a run "
            f"holds at most {MOST_TRIALS}; cut it into several."
        )
    points: dict[tuple, Config] = {}
    for point in sweep.points():
        for candidate in (_fresh(point, fresh), point):
            _check(candidate, specs[candidate.dataset])
            points.setdefault(tuple(canonical(candidate).values()), candidate)
    values = [dict(zip(canonical(p), key, strict=True)) for key, p in points.items()]
    varied = {
        name
        for name, spec in FIELDS.items()
        if spec.metadata["kind"] in SWEPT_KINDS and (name in fresh or len(sweep.values[name]) > 1)
    }
    swept = tuple(name for name in FIELDS if name in varied)

    def label(value: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={value[name]}" for name in swept if value[name] is not None)

    names = {key: label(value) for key, value in zip(points, values, strict=True)}
    arms, trials = [], []
    for (key, point), value in zip(points.items(), values, strict=True):
        reference = names[tuple(canonical(_fresh(point, fresh)).values())]
        arms.append(Arm(names[key], {n: value[n] for n in swept}, reference, point))
    for arm in arms:
        spec = specs[arm.point.dataset]
        size = sampler.train_size(spec.train_examples, arm.point.train_examples, arm.point.validation_fraction)
        for seed in range(sweep.first_seed, sweep.first_seed + sweep.seeds):
            trials.append(Trial(len(trials), arm.arm, seed, arm.point, stages(arm.point, size)))
    return Study(sweep, swept, tuple(arms), tuple(trials))
