"""What a run is made of: every field, declared once, with its type, range, default and meaning.

A `Config` is one *point* of a sweep: one value a field. A `Sweep` holds a tuple of values for each field;
`Sweep.points()` is their product. Both are checked here, and only here, before any work starts.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, dataclass_transform

from plastic_jax.errors import InputError
from plastic_jax.fields import Field
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.methods.optimisers import OPTIMISERS
from plastic_jax.methods.schedules import SCHEDULES
from plastic_jax.models import MODELS

NORMS = ("batch", "layer", "none")
INITIALISATIONS = ("pytorch", "he", "lecun")
COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
KERNELS = ("packed", "mapped", "products", "native")
BEGINNINGS = ("none", "reinitialise")

FIELDS: dict[str, Field] = {}
"""All fields by name: those of `Config`, then those that interventions and diagnostics declare."""


def _field(default: Any, kind: str, doc: str, **more: Any) -> Any:
    return Field(default, kind, doc, **more)


def add_fields(fields: Mapping[str, Field], owner: str) -> None:
    """Take the fields of a method into the config.

    Raises:
      InputError: a name is taken, or is none.
    """
    for name in fields:
        if name in FIELDS or name in REPLACED or name == "more":
            raise InputError(f"{owner} declares the field {name!r}, which exists already.")
        if not name.isidentifier():
            raise InputError(f"{owner} declares the field {name!r}: a name has only letters, digits and _.")
    for name, field in fields.items():
        FIELDS[name] = field.named(name)


def reset_modules(text: str) -> tuple[int, ...]:
    """The module numbers that a value of `reset` names, ascending: 1-3+6 -> (1, 2, 3, 6); () for none.

    Raises:
      ValueError: it is not of that form.
    """
    if text == "none":
        return ()
    found: set[int] = set()
    for part in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(text)
        found |= {*range(first, last + 1)}
    return tuple(sorted(found))


def reset_text(modules: tuple[int, ...]) -> str:
    """The one spelling of a set of modules: ranges as long as can be, ascending."""
    starts = [m for m in modules if m - 1 not in modules]
    ends = [m for m in modules if m + 1 not in modules]
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) or "none"


def diagnostics_named(text: str) -> tuple[str, ...]:
    """The diagnostics that a value of `diagnostics` names, in the registry's order; () for none.

    Raises:
      ValueError: one of them is none.
    """
    named = set(text.replace(" ", "").split("+")) if text != "none" else set()
    if not named <= set(DIAGNOSTICS):
        raise ValueError(text)
    return tuple(name for name in DIAGNOSTICS if name in named)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(_field,))
class _Declared:
    """What `Config` is built on: values of declared fields, defaults for the others; equal ones hash alike."""

    def __init_subclass__(cls) -> None:
        for name, field in list(vars(cls).items()):
            if isinstance(field, Field):
                FIELDS[name] = field.named(name)
                delattr(cls, name)

    def __init__(self, **values: Any):
        if unknown := [name for name in values if name not in FIELDS]:
            raise TypeError(f"{unknown[0]} is no field of the config")
        own = {name: value for name, value in values.items() if value != FIELDS[name].default}
        vars(self).update({name: field.default for name, field in FIELDS.items()} | values, _own=own)

    def __getattr__(self, name: str) -> Any:
        """Of a field that was declared later, its default."""
        if name.startswith("_") or name not in FIELDS:
            raise AttributeError(name)
        return FIELDS[name].default

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be changed: use replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._own == other._own

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._own.items())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._own.items())})"


class Config(_Declared):
    """One point of a sweep. Defaults are the paper's common setting (arXiv 2106.00042)."""

    # fmt: off
    dataset: str = _field("cifar10", "static", "data set: digits, fashion_mnist, cifar10, cifar100, svhn_cropped, or any prepared array_record TFDS name")
    train_examples: int = _field(0, "static", "size of the train set, which each seed draws for itself; 0 = all", low=0)
    validation_fraction: float = _field(0.0, "static", "share of the train set held back and evaluated beside the test set, for choosing settings", low=0.0, high=0.9)
    label_noise: float = _field(0.0, "dynamic", "share of the train labels replaced by another class, uniformly", low=0.0, high=1.0)
    model: str = _field("resnet", "static", "model", choices=lambda: MODELS.names)
    width: int = _field(64, "static", "units a hidden layer (mlp), or channels w of the first module (resnet)", low=1)
    depth: int = _field(2, "static", "hidden layers (mlp), or basic blocks d a module (resnet)", low=1)
    norm: str = _field("batch", "static", "normalisation", choices=NORMS)
    initialisation: str = _field("pytorch", "static", "initialisation: PyTorch's default (kaiming uniform, a = sqrt 5), he or lecun", choices=INITIALISATIONS)
    compute_dtype: str = _field("float32", "static", "arithmetic; parameters stay float32 (float64 is for verification)", choices=COMPUTE_DTYPES)
    optimizer: str = _field("adam", "static", "optimiser", choices=lambda: OPTIMISERS.names, hints={"adamw": "AdamW is optimizer=adam with decoupled=True and a weight_decay"})
    learning_rate: float = _field(1e-3, "dynamic", "learning rate", above=0.0)
    tuning_learning_rate_factor: float = _field(1.0, "dynamic", "the tuning stage's learning rate over `learning_rate` (fresh arm too)", above=0.0)
    schedule: str = _field("constant", "dynamic", "learning rate over a stage: constant, or falling to 0 by a cosine or a line", choices=SCHEDULES)
    batch_size: int = _field(128, "static", "examples a step", low=1)
    pretraining_fraction: float = _field(0.5, "dynamic", "share of the train set that a single pretraining stage sees (with `uniform_fraction` = 1; else without effect)", above=0.0, high=1.0)
    warm_start_epochs: int = _field(350, "dynamic", "epochs of each pretraining stage: passes over its own subset; 0 = fresh", low=0)
    pretraining_stages: int = _field(1, "dynamic", "n, stages before the tuning stage, on nested subsets of the train set (the paper's figure 4); 0 = fresh", low=0)
    uniform_fraction: float = _field(1.0, "dynamic", "r, share of the train set that is divided among the stages at random; the rest comes class by class (figure 4, right)", low=0.0, high=1.0)
    reset: str = _field("none", "dynamic", "modules re-initialised when tuning begins after pretraining (figure 6): none, or numbers and ranges joined by +, as 6, 1-3, 1+4-6", read=lambda text: reset_text(reset_modules(text)), takes="none, or module numbers and ranges joined by +, as 6, 1-3, 1+4-6")
    intervention: str = _field("none", "dynamic", "what happens to the parameters when a stage after the first begins: none, or reinitialise all of them", choices=BEGINNINGS)
    chunk_examples: int = _field(0, "dynamic", "online setting (Ash & Adams): so many further examples arrive before each stage, each of at most `tuning_epochs` on all that are there; 0 = off", low=0)
    transition: str = _field("abrupt", "dynamic", "from the pretraining subset to the whole train set: abrupt (two stages), or smooth (one stage that mixes them, the paper's figure 3)", choices=("abrupt", "smooth"))
    gamma: float = _field(0.5, "dynamic", "smooth transition: at step n of N an example comes from the whole train set with probability 1 - gamma^(50 n / N), else from the subset; 0 = always from the whole", low=0.0, high=1.0)
    tuning_epochs: int = _field(500, "dynamic", "tuning epochs: passes over the whole train set", low=1)
    metric_epochs: int = _field(100, "run", "last epochs of the tuning stage over which the metric, test accuracy, is averaged", low=1)
    eval_every: int = _field(1, "run", "epochs between evaluations; a stage's end is always evaluated", low=1)
    stage_accuracy: float = _field(0.0, "dynamic", "a stage ends at the first epoch whose train accuracy reaches this; 0 = never early", low=0.0, high=1.0)
    accuracy_ends: str = _field("all", "dynamic", "the stages that `stage_accuracy` ends: all, or those before the tuning stage (pretraining)", choices=("all", "pretraining"))
    max_stage_epochs: int = _field(0, "dynamic", "cap on the epochs of a stage that ends by accuracy; 0 = the stage's own epochs", low=0)
    batch_stats: str = _field("carry", "dynamic", "BatchNorm's running statistics at a stage's start", choices=("carry", "restart"))
    reset_optimizer: bool = _field(True, "dynamic", "optimiser state reset at a stage's start")
    equal_updates: bool = _field(True, "run", "train the fresh arm on, to each pretrained arm's total number of updates, as a control")
    seeds: int = _field(5, "run", "number of seeds", low=1)
    first_seed: int = _field(0, "run", "the first seed; the others follow it", low=0, high=2**31 - 2)
    diagnostics: str = _field("none", "run", "what is measured beside accuracy and loss, at each evaluation: none, or names joined by +", read=lambda text: "+".join(diagnostics_named(text)) or "none", takes=lambda: "none, or names joined by + of " + ", ".join(DIAGNOSTICS.names))
    keep: str = _field("none", "run", "models kept for `plastic_jax.load`: none, at trials' ends, or at every stage's end", choices=("none", "ends", "stages"))
    checkpoint_minutes: float = _field(5.0, "run", "minutes between checkpoints", above=0.0)
    kernels: str = _field("auto", "run", "how trials are computed: packed in blocks (for accelerators, MLPs everywhere), mapped one after another, products or native (a CPU's convolutional nets; native is compiled by this machine's C++ compiler), or auto: measured before a long run, by rule before a short one", choices=("auto", *KERNELS))
    block: int = _field(0, "run", "packed: trials computed together; 0 = chosen", low=0)
    group: int = _field(0, "run", "packed: trials of a block whose channels lie side by side in one convolution; 0 = chosen", low=0)
    trials_per_device: int = _field(0, "run", "trials side by side on one device; 0 = chosen from the model and the memory", low=0)
    # fmt: on

    @property
    def course(self) -> str:
        """What a trial goes through: `online`, `smooth`, `fresh` (tuning alone) or `pretrained` (then tuned)."""
        if self.chunk_examples:
            return "online"
        if self.transition == "smooth":
            return "smooth"
        return "pretrained" if self.warm_start_epochs and self.pretraining_stages else "fresh"

    @property
    def nesting(self) -> tuple[int, float]:
        """(n, r), where they shape the trial's permutation of the train set, else (1, 1)."""
        shaped = self.course == "pretrained" and self.uniform_fraction < 1
        return (self.pretraining_stages, self.uniform_fraction) if shaped else (1, 1.0)

    def replace(self, **values: Any) -> "Config":
        """The same with other values."""
        return Config(**{**self._own, **values})

    def compiled(self) -> "Config":
        """The values that a program is compiled for, and defaults for the others."""
        names = {"diagnostics", *static_fields()}
        for name in diagnostics_named(self.diagnostics):
            names |= {*DIAGNOSTICS[name].fields}
        return Config(**{name: value for name, value in self._own.items() if name in names})


def static_fields() -> tuple[str, ...]:
    """The names of the static fields."""
    return tuple(name for name, field in FIELDS.items() if field.kind == "static")


# Fields of earlier versions, and what took their place.
REPLACED = {
    "trial_axis": "kernels (packed or mapped), block and group",
    "convolution": "kernels (products or native; plain ones are packed or mapped)",
}


for _kind in (INTERVENTIONS, DIAGNOSTICS):
    for _name, _entry in _kind.items():
        add_fields(_entry.fields, f"{_kind.kind} {_name}")


def allowed(name: str) -> str:
    """What a field takes, in words: `a whole number of at least 1`."""
    return FIELDS[name].allowed()


def check_name(name: str) -> None:
    """Refuse an unknown field, and name the one that was perhaps meant."""
    if name in FIELDS:
        return
    if name in REPLACED:
        raise InputError(f"--config.{name} is a field no more: set {REPLACED[name]} instead.")
    near = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "the fields are " + ", ".join(FIELDS) + "."
    raise InputError(f"--config.{name} is no field of the config: {hint}")


@dataclass(frozen=True)
class Sweep:
    """A tuple of values for every field, each checked; run fields hold one value."""

    values: Mapping[str, tuple[Any, ...]]

    def __repr__(self) -> str:
        own = {name: value for name, value in self.as_dict().items() if value != FIELDS[name].default}
        return f"Sweep({', '.join(f'{name}={value!r}' for name, value in own.items())})"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Sweep":
        """From one value or a sequence of values a field; fields not named take their default.

        Raises:
          InputError: an unknown field, or a value of the wrong type, out of range, or named twice.
        """
        for name in values:
            check_name(name)
        checked = {}
        for name, spec in FIELDS.items():
            given = values.get(name, spec.default)
            if isinstance(given, range) or hasattr(given, "tolist"):  # NumPy's arrays and scalars
                given = list(given) if isinstance(given, range) else given.tolist()
            if isinstance(given, (tuple, list)):
                given = tuple(getattr(value, "item", lambda value=value: value)() for value in given)
            if isinstance(given, str) and spec.type is str:
                given = tuple(part.strip() for part in given.split(","))
            if not isinstance(given, (tuple, list)):
                given = (given,)
            if len(given) == 1 and isinstance(given[0], str) and "," in given[0]:
                given = tuple(part.strip() for part in given[0].split(","))
            given = tuple(spec.check(value) for value in given)
            if not given:
                raise InputError(f"--config.{name}=() is empty: name at least one value.")
            if len(set(given)) < len(given):
                raise InputError(f"--config.{name}={given} names a value twice: each counts once.")
            if len(given) > 1 and not spec.swept:
                raise InputError(f"--config.{name}={given} is not allowed: {name} takes one value for the whole run.")
            checked[name] = given
        return cls(checked)

    def __getattr__(self, name: str) -> Any:
        """A run field's one value."""
        if name.startswith("_") or name not in FIELDS:
            raise AttributeError(name)
        if len(self.values[name]) != 1:
            raise AttributeError(f"{name} is swept: {self.values[name]}")
        return self.values[name][0]

    def points(self) -> Iterator[Config]:
        """The product of all values, the field declared last varying fastest."""
        for values in itertools.product(*self.values.values()):
            yield Config(**dict(zip(self.values, values, strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """For config.json: a value where there is one, else a list."""
        return {n: v[0] if len(v) == 1 else list(v) for n, v in self.values.items()}


def canonical(point: Config) -> dict[str, Any]:
    """The point's swept-kind fields, null where a field has no effect: equal ones are one trial (contract 10)."""
    values = {n: getattr(point, n) for n, field in FIELDS.items() if field.swept}
    course, later = point.course, point.course in ("pretrained", "online")  # later: stages after the first
    if course != "smooth":
        values["gamma"] = None
    if course != "pretrained":
        values.update(uniform_fraction=None, reset=None)
        values |= dict.fromkeys(("warm_start_epochs", "pretraining_stages"), 0 if course == "fresh" else None)
    if not later:
        values.update(batch_stats=None, reset_optimizer=None, intervention=None)
    elif point.intervention == "reinitialise":  # of everything
        values.update(batch_stats=None, reset_optimizer=None, reset=None)
    if course == "online":
        values["tuning_learning_rate_factor"] = None
    single = course == "pretrained" and point.pretraining_stages == 1 and point.uniform_fraction == 1
    if not (single or (course == "smooth" and point.gamma)):
        values["pretraining_fraction"] = None
    if not point.stage_accuracy or not (later or point.accuracy_ends == "all"):
        values.update(stage_accuracy=0.0, accuracy_ends=None, max_stage_epochs=None)
    if not OPTIMISERS[point.optimizer].keeps_state:
        values["reset_optimizer"] = None
    if point.norm != "batch":
        values["batch_stats"] = None
    for method in INTERVENTIONS.values():
        if not (later or method.in_steps):
            values |= dict.fromkeys(method.fields)
        elif not method.active(point):
            values |= {name: None for name, field in method.fields.items() if field.off is None}
    return values
