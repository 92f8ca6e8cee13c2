"""Stages, trials and arms: what a point of the sweep means in terms of training.

A trial is a seed and a list of stages. Arms are the points of the sweep; trials that differ only in fields without
effect are one trial (contract 10), and the fresh arm of every combination is always there.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plastic_jax import models
from plastic_jax.data import DatasetSpec, sampler
from plastic_jax.errors import InputError
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.study.config import FIELDS, Config, Sweep, canonical, diagnostics_named, reset_modules, static_fields

PRETRAINING, CHUNK, TUNING, CONTINUED = "pretraining", "chunk", "tuning", "tuning_continued"
# The tuning stage's order stream, its own whatever comes before it (contract 2); stage i before it has stream i.
TUNING_STREAM = 0


NO_MIXTURE = -1.0
MOST_TRIALS = 100_000  # of a run: beyond, the table no longer fits the host
MOST_STAGES = 200  # of a trial


@dataclass(frozen=True)
class Stage:
    """A phase of training on the first `size` examples of the trial's permutation.

    It ends after `epochs`, or at the end of the first epoch whose train accuracy reaches `accuracy` (0: never early).
    What happens at its start: BatchNorm's statistics and the optimiser's state are restarted or carried, and the
    modules `redrawn` (numbers from 1) are re-initialised. `acting` names the interventions that act at its start or
    during it, `strengths` are their dynamic fields with their values.
    A smooth transition (`gamma` not NO_MIXTURE) draws its examples, with replacement, from the whole `size` or from
    the first `prefix`; an epoch is then as many examples as `size`.
    """

    name: str
    stream: int
    size: int
    epochs: int
    learning_rate: float
    accuracy: float
    restart_batch_stats: bool
    reset_optimizer: bool
    redrawn: tuple[int, ...] = ()
    prefix: int = 0
    gamma: float = NO_MIXTURE
    acting: tuple[str, ...] = ()
    strengths: tuple[tuple[str, float], ...] = ()


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
        """Trials with equal keys run in one compiled program: those of the same static values and interventions.

        Interventions that act at a stage's start alone are another program's affair, and part no trials.
        """
        acting = (name for name, method in INTERVENTIONS.items() if method.in_steps and method.active(self.point))
        return (*(getattr(self.point, name) for name in static_fields()), *acting)

    @property
    def sample(self) -> tuple[Any, ...]:
        """Trials of one program with equal keys have the same train set, labels and permutation."""
        return (self.seed, self.point.label_noise, *self.point.nesting)


@dataclass(frozen=True)
class Arm:
    """A point of the sweep: its name, its swept values (null: without effect), the name of its fresh arm."""

    arm: str
    values: Mapping[str, Any]
    fresh: str
    point: Config


@dataclass(frozen=True)
class Study:
    """A sweep spelled out: the swept fields, the arms in order, and all trials, arm by arm and seed by seed.

    `estimated`: sizes of stages depend on labels that were not at hand; they are those of classes of one size.
    """

    sweep: Sweep
    swept: tuple[str, ...]
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    estimated: bool = False

    def __repr__(self) -> str:
        return f"Study({len(self.arms)} arms, {len(self.trials)} trials, swept: {', '.join(self.swept) or 'nothing'})"


def stage_sizes(point: Config, size: int, classes: int) -> tuple[int, ...]:
    """Sizes of the stages' data sets; an estimate where `uniform_fraction` is below 1."""
    if point.course == "online":
        return (*range(point.chunk_examples, size, point.chunk_examples), size)
    if point.course != "pretrained":
        return (size,)
    n, r = point.pretraining_stages, point.uniform_fraction
    if n == 1 and r == 1:
        return (sampler.subset_size(size, point.pretraining_fraction), size)
    return sampler.nested_sizes(size, classes, n, r)


def stages(point: Config, sizes: tuple[int, ...]) -> tuple[Stage, ...]:
    """The stages of a point on data sets of `sizes`, the last of which is the whole train set (paper, section 3)."""
    course, before = point.course, len(sizes) - 1

    def name(i: int) -> str:
        kind = CHUNK if course == "online" else PRETRAINING
        return kind if before == 1 and course != "online" else f"{kind}_{i:0{len(str(before))}}"

    found = []
    for i, size in enumerate(sizes, 1):
        first, last = i == 1, i == len(sizes)
        accuracy = point.stage_accuracy if point.accuracy_ends == "all" or not last else 0.0
        epochs = point.tuning_epochs if last or course == "online" else point.warm_start_epochs
        if accuracy and point.max_stage_epochs:
            epochs = min(epochs, point.max_stage_epochs)
        redrawn: tuple[int, ...] = ()
        if not first and point.intervention == "reinitialise":
            redrawn = tuple(range(1, models.modules(point.model, point.depth) + 1))
        elif last and course == "pretrained":
            redrawn = reset_modules(point.reset)
        anew = first or point.intervention == "reinitialise"
        acting = [n for n, method in INTERVENTIONS.items() if method.active(point) and (method.in_steps or not first)]
        dynamic = [f for n in acting for f, field in INTERVENTIONS[n].fields.items() if field.kind == "dynamic"]
        strengths = tuple((name, getattr(point, name)) for name in dynamic)
        factor = point.tuning_learning_rate_factor if last and course != "online" else 1.0
        found.append(
            Stage(
                name=TUNING if last else name(i),
                stream=TUNING_STREAM if last else i,
                size=size,
                epochs=epochs,
                learning_rate=point.learning_rate * factor,
                accuracy=accuracy,
                restart_batch_stats=anew or point.batch_stats == "restart",
                reset_optimizer=anew or point.reset_optimizer,
                redrawn=redrawn,
                acting=tuple(acting),
                strengths=strengths,
            )
        )
    if course == "smooth":
        subset = sampler.subset_size(sizes[-1], point.pretraining_fraction)
        prefix = subset if point.gamma else sizes[-1]
        found[-1] = dataclasses.replace(found[-1], gamma=point.gamma, prefix=prefix)
    return tuple(found)


def _check_units(point: Config) -> None:
    """Refuse methods that act on units, or measure them, where the model declares none."""
    wanted = [("diagnostics", name) for name in diagnostics_named(point.diagnostics) if DIAGNOSTICS[name].needs_units]
    for method in INTERVENTIONS.values():
        if method.needs_units and method.active(point):
            wanted += [(n, getattr(point, n)) for n, field in method.fields.items() if field.off is not None]
    if wanted and not models.MODELS[point.model].units(point):
        field, value = wanted[0]
        raise InputError(
            f"--config.{field}={value} is not allowed with model={point.model}: this model does not declare its units."
        )


def _check(point: Config, spec: DatasetSpec) -> None:
    """Refuse a point whose fields are each allowed but impossible together."""
    _check_units(point)
    rounded = float(np.float32(point.gamma))  # as the compiled program has it
    if point.transition == "smooth" and (rounded >= 1 or (point.gamma and not rounded)):
        raise InputError(
            f"--config.gamma={point.gamma} is not allowed: a number from 0 to below 1 (with 1 the whole set is never "
            f"drawn from), and this is {rounded:g} in single precision."
        )
    pool = spec.train_examples
    held = sampler.validation_size(pool, point.validation_fraction)
    size = sampler.train_size(pool, point.train_examples, point.validation_fraction)
    if size > pool - held:
        left = f"{pool - held} are left beside the validation set" if held else f"{spec.name} has {pool}"
        raise InputError(f"--config.train_examples={point.train_examples} is not allowed: {left}.")
    if size < 1:
        raise InputError(f"--config.validation_fraction={point.validation_fraction} leaves no train example of {pool}.")
    if point.chunk_examples > size:
        raise InputError(
            f"--config.chunk_examples={point.chunk_examples} is not allowed: the train set has {size} examples, and a "
            "chunk holds at most that many (0 = off)."
        )
    if point.chunk_examples and point.transition == "smooth":
        raise InputError(
            f"--config.chunk_examples={point.chunk_examples} is not allowed with transition=smooth: examples arrive "
            "in chunks, or the sampler moves smoothly from the subset to the whole train set."
        )
    number = models.modules(point.model, point.depth)
    if point.reset != "none" and reset_modules(point.reset)[-1] > number:
        raise InputError(
            f"--config.reset={point.reset} is not allowed: this {point.model} of depth={point.depth} has the modules "
            f"1 to {number}."
        )
    parts = point.pretraining_stages + 1
    if point.course == "pretrained" and point.uniform_fraction < 1 and parts > spec.classes:
        raise InputError(
            f"--config.pretraining_stages={point.pretraining_stages} is not allowed with "
            f"uniform_fraction={point.uniform_fraction:g}: the {spec.classes} classes of {spec.name} would be cut into "
            f"the {parts} sets C_1 .. C_{parts}, and {parts - spec.classes} of these would be empty; at most "
            f"{spec.classes - 1} stages here, any number with uniform_fraction=1."
        )
    count = -(-size // point.chunk_examples) if point.chunk_examples else parts
    if count > MOST_STAGES and point.course in ("online", "pretrained"):
        field = "chunk_examples" if point.chunk_examples else "pretraining_stages"
        raise InputError(
            f"--config.{field}={getattr(point, field)} is not allowed: it makes {count} stages, and a trial has at "
            f"most {MOST_STAGES}."
        )
    _check_stages(point, stages(point, stage_sizes(point, size, spec.classes)))


_SHAPING = {
    "online": ("chunk_examples",),
    "pretrained": ("pretraining_fraction", "pretraining_stages", "uniform_fraction"),
}


def _check_stages(point: Config, found: tuple[Stage, ...], seed: int | None = None) -> None:
    """Refuse stages that are too small for a batch or too long; `seed`: whose labels make their sizes."""
    for stage in found:
        if point.batch_size > stage.size:
            own = canonical(point)
            shaping = [f"{n}={own[n]}" for n in _SHAPING.get(point.course, ()) if own[n] is not None]
            why = f" ({', '.join(shaping)})" if shaping else ""
            of = "" if seed is None else f" of seed {seed}"
            raise InputError(
                f"--config.batch_size={point.batch_size} is not allowed: the {stage.name} stage{of} has "
                f"{stage.size} examples{why}, and a batch holds at most that many."
            )
        if (stage.epochs + 1) * stage.size + point.batch_size > 2**31 - 1:
            raise InputError(
                f"--config: the {stage.name} stage of {stage.epochs} epochs of {stage.size} examples is too long: "
                f"at most {2**31 - 1} examples a stage."
            )
    if sum(sampler.stage_steps(s.size, s.epochs, point.batch_size) for s in found) > 2**31 - 1:
        raise InputError(f"--config: the {len(found)} stages are too long together: at most {2**31 - 1} steps a trial.")


def _check_run(sweep: Sweep) -> None:
    """Refuse run fields that are impossible together with the swept ones."""
    if len(sweep.values["compute_dtype"]) > 1 and "float64" in sweep.values["compute_dtype"]:
        raise InputError(
            f"--config.compute_dtype={sweep.values['compute_dtype']} is not allowed: float64 must be a run's only "
            "type, since it changes how JAX computes throughout."
        )
    shortest = min(sweep.values["tuning_epochs"])
    if any(sweep.values["stage_accuracy"]) and "all" in sweep.values["accuracy_ends"]:
        shortest = min([shortest, *filter(None, sweep.values["max_stage_epochs"])])
    if sweep.metric_epochs > shortest:
        raise InputError(
            f"--config.metric_epochs={sweep.metric_epochs} is not allowed: the tuning stage has {shortest} epochs, "
            "and the metric averages over at most that many."
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
    return point.replace(**fresh)


def _trial_sizes(point: Config, spec: DatasetSpec, seed: int, labels: np.ndarray | None) -> tuple[int, ...]:
    size = sampler.train_size(spec.train_examples, point.train_examples, point.validation_fraction)
    if labels is None or point.nesting == (1, 1.0):
        return stage_sizes(point, size, spec.classes)
    drawn = sampler.train_set(
        seed,
        labels,
        spec.classes,
        train_examples=point.train_examples,
        validation_fraction=point.validation_fraction,
        label_noise=point.label_noise,
        nesting=point.nesting,
    )
    return tuple(drawn.sizes.tolist())


def without_effect(of: Study) -> list[str]:
    """A sentence for each field that was given another value than its default, and has no effect on any arm."""
    found, points = [], [canonical(arm.point) for arm in of.arms]
    for name, field in FIELDS.items():
        values = of.sweep.values[name]
        if field.swept and values != (field.default,) and all(point[name] is None for point in points):
            shown = values[0] if len(values) == 1 else values
            found.append(f"Note: {name}={shown} has no effect on any arm of this study.")
    return found


def study(
    sweep: Sweep,
    specs: Mapping[str, DatasetSpec],
    fresh: Mapping[str, Any],
    labels: Mapping[str, np.ndarray] | None = None,
) -> Study:
    """Spell a sweep out into arms and trials.

    Args:
      sweep: the checked fields.
      specs: the size of each data set named in the sweep.
      fresh: the fields that turn a point into its fresh arm, such as {"warm_start_epochs": 0}.
      labels: each data set's own train labels [pool]; without them, sizes of stages that depend on labels
        (`uniform_fraction` below 1) are estimates, and the study says so.

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
    varied = {name for name, spec in FIELDS.items() if spec.swept and (name in fresh or len(sweep.values[name]) > 1)}
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
        own = labels[arm.point.dataset] if labels is not None else None
        for seed in range(sweep.first_seed, sweep.first_seed + sweep.seeds):
            found = stages(arm.point, _trial_sizes(arm.point, spec, seed, own))
            _check_stages(arm.point, found, seed)
            trials.append(Trial(len(trials), arm.arm, seed, arm.point, found))
    estimated = labels is None and any(arm.point.nesting != (1, 1.0) for arm in arms)
    return Study(sweep, swept, tuple(arms), tuple(trials), estimated)
