"""Plug-ins: a user's own models, optimisers, data sets, interventions, diagnostics and experiments.

A plug-in is a Python file that calls `plastic_jax.register`. It is named by `--plugin=my_idea.py`, or an installed
package has it as an entry point of the group `plastic_jax`. What was taken in, and a hash of its source, is written
into config.json.
"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plastic_jax.data import DATASETS, DataSource
from plastic_jax.errors import InputError
from plastic_jax.fields import Field
from plastic_jax.methods.diagnostics import DIAGNOSTICS, Diagnostic
from plastic_jax.methods.interventions import INTERVENTIONS, Intervention
from plastic_jax.methods.interventions.base import IN_STEPS
from plastic_jax.methods.optimisers import OPTIMISERS, Optimiser
from plastic_jax.models import MODELS, Model
from plastic_jax.registry import Registry
from plastic_jax.study.config import FIELDS, Config, add_fields, diagnostics_named

GROUP = "plastic_jax"  # of entry points
_KINDS: list[tuple[type, Registry[Any]]] = [
    (Intervention, INTERVENTIONS),
    (Diagnostic, DIAGNOSTICS),
    (Optimiser, OPTIMISERS),
    (Model, MODELS),
    (DataSource, DATASETS),
]
TABLE = ("trial", "arm", "seed", "stage", "epoch", "step", "examples_seen", "diverged", "accuracy_reached")


@dataclass(frozen=True)
class Registered:
    """What was taken in: its kind and name, the file that it is from, and SHA-256 of that file's bytes."""

    kind: str
    name: str
    file: str
    sha256: str


REGISTERED: list[Registered] = []
_loaded: set[Path] = set()


def kind(of: type, registry: Registry[Any]) -> None:
    """Let users register entries of a further type: one of a room that this one cannot import."""
    _KINDS.append((of, registry))


def register(entry: Any, name: str | None = None) -> Any:
    """Take a method or a model into the registries; `plastic_jax.register`, also as a decorator of a class.

    Args:
      entry: an `Intervention` or `Diagnostic` (a subclass or an instance), an `Optimiser`, a `Model`, a
        `DataSource` or an `Experiment`.
      name: what it is called in a config; by default an intervention's or diagnostic's class name in small letters with
        underscores.

    Returns:
      `entry`.

    Raises:
      InputError: it is none of these, its name or one of its fields is taken, or a field is of a kind that it can't be.
    """
    if lacking := getattr(entry, "__abstractmethods__", ()) if isinstance(entry, type) else ():
        raise InputError(f"{entry.__name__} cannot be registered: it does not define {', '.join(sorted(lacking))}.")
    made = entry() if isinstance(entry, type) else entry
    registry = next((registry for kind, registry in _KINDS if isinstance(made, kind)), None)
    if registry is None:
        kinds = ", ".join(kind.__name__ for kind, _ in _KINDS)
        raise InputError(f"{entry!r} cannot be registered: it is none of {kinds}.")
    if name is None and isinstance(made, (Intervention, Diagnostic)):
        name = _underscored(type(made).__name__)
    name = name or getattr(made, "name", None)
    if not name:
        raise InputError(f"{type(made).__name__} needs a name: register(entry, name).")
    owner, fields = f"the {registry.kind} {name!r}", getattr(made, "fields", {})
    _check_fields(owner, made, fields)
    _check_columns(owner, getattr(made, "columns", ()))
    if name not in registry.names:
        add_fields(fields, owner)
    registry.add(name, made)
    REGISTERED.append(Registered(registry.kind, name, *_source(made)))
    return entry


def declared(entry: Registered) -> tuple[str, ...]:
    """The names of the fields that a plug-in declares."""
    return tuple(getattr(_registry(entry)[entry.name], "fields", ()))


def takes_part(entry: Registered, point: Config, experiment: str) -> bool:
    """Whether a trial of an experiment with these values is trained or measured by it."""
    made = _registry(entry)[entry.name]
    if isinstance(made, Intervention):
        return made.active(point)
    if isinstance(made, Diagnostic):
        return entry.name in diagnostics_named(point.diagnostics)
    chosen = {"model": point.model, "optimizer": point.optimizer, "data set": point.dataset, "experiment": experiment}
    return chosen[entry.kind] == entry.name


def _registry(entry: Registered) -> Registry[Any]:
    return next(registry for _, registry in _KINDS if registry.kind == entry.kind)


def forget(name: str) -> None:
    """Take back what was registered under that name."""
    for found in [r for r in REGISTERED if r.name == name]:
        registry = _registry(found)
        for field in declared(found):
            del FIELDS[field]
        registry.remove(name)
        REGISTERED.remove(found)


def load(files: Iterable[str]) -> None:
    """Run the files, each once in a process, and the entry points of installed packages.

    Raises:
      InputError: a file is not there, cannot be imported, or registers nothing.
    """
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        if entry_point.value not in sys.modules:
            _run(entry_point.load, f"the installed plug-in {entry_point.name} ({entry_point.value})")
    for file in files:
        path = Path(file).expanduser().resolve()
        if path in _loaded:
            continue
        if not path.is_file() or path.suffix != ".py":
            raise InputError(f"--plugin={file} is not allowed: name a Python file (.py) that exists.")
        before = len(REGISTERED)
        _run(lambda path=path: _import(path), f"--plugin={file}")
        if len(REGISTERED) == before:
            raise InputError(f"--plugin={file} registers nothing: it has to call plastic_jax.register.")
        _loaded.add(path)


def _import(path: Path) -> None:
    name = f"plastic_jax_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where inspect finds its classes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _run(load: Any, what: str) -> None:
    try:
        load()
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    except Exception as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        reason = f"{type(error).__name__}: {where}{str(error).splitlines()[0] if str(error) else 'no message'}"
        raise InputError(f"{what} cannot be imported ({reason}).") from error


def _check_fields(owner: str, made: Any, fields: dict[str, Field]) -> None:
    kinds = ("run",) if isinstance(made, Diagnostic) else ("static", "dynamic")
    words = " or ".join(kinds)
    for name, field in fields.items():
        if not isinstance(field, Field) or field.kind not in kinds:
            raise InputError(f"{owner} declares the field {name!r}, which must be a Field of kind {words}.")
        if field.kind == "dynamic" and field.type not in (float, int):
            raise InputError(f"{owner} declares the dynamic field {name!r}, whose default must be a number.")
    if isinstance(made, Intervention) and not any(field.off is not None for field in fields.values()):
        raise InputError(f"{owner} declares no field with an `off`: nothing would tell when it acts.")
    if isinstance(made, Intervention) and not (made.in_steps or made.does("at_start")):
        raise InputError(f"{owner} does nothing: it defines none of at_start, {', '.join(IN_STEPS)}.")


def _check_columns(owner: str, columns: Iterable[Any]) -> None:
    taken = {column.name for other in DIAGNOSTICS.values() for column in other.columns}
    for column in columns:
        name = column.name
        if name in taken or name in TABLE or name in FIELDS or name.endswith(("_accuracy", "_loss")):
            raise InputError(f"{owner} declares the column {name!r}, which exists already.")


def _source(made: Any) -> tuple[str, str]:
    """The file that an entry is from, and SHA-256 of its bytes; empty where it was typed at a prompt."""
    functions = [getattr(made, part, None) for part in ("transformation", "build", "read", "draw")]
    for what in (*filter(None, functions), type(made)):
        try:
            file = inspect.getsourcefile(what)
        except TypeError:
            continue
        if file and Path(file).is_file():
            return file, hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return "", ""


def _underscored(name: str) -> str:
    """`MyIdea` -> `my_idea`."""
    return "".join(f"_{c.lower()}" if c.isupper() and k else c.lower() for k, c in enumerate(name))
