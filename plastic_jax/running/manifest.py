"""config.json: what a run is, what made it, and whether a command asks for the same run."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from plastic_jax import backend
from plastic_jax.data import Dataset
from plastic_jax.errors import InputError
from plastic_jax.study import plugins
from plastic_jax.study.config import FIELDS, REPLACED, Sweep, canonical
from plastic_jax.study.trial import Study

SCHEMA = 2
"""The version of a workdir's files; 1 if config.json names none."""
PACKAGES = ("plastic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
TRAINED_BY = ("data", "kernels", "methods", "models", "study", "train", "backend.py", "streams.py")
"""What can change a number of the results table; plug-ins are recorded beside it."""
# Fields that may differ between a run and the same run asked for again: when checkpoints are written, ...
UNESSENTIAL = ("checkpoint_minutes",)
# ... and how what was trained is analysed.
ANALYSIS = ("metric_epochs",)


def versions() -> dict[str, str]:
    """Version of Python and of the packages that a result depends on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True)  # noqa: E731
        head = git("rev-parse", "HEAD").stdout.strip()
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code() -> str:
    """SHA-256 over the files that can change a number of the results table."""
    package, total = Path(__file__).parents[1], hashlib.sha256()
    for part in TRAINED_BY:
        whole = package / part
        for file in [whole] if whole.is_file() else sorted(whole.rglob("*")):
            if file.suffix in (".py", ".cc", ".h"):
                total.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def used(study: Study, experiment: str) -> list[plugins.Registered]:
    """The plug-ins that take part in a study; others may have been registered beside them."""
    points = [arm.point for arm in study.arms]
    return [e for e in plugins.REGISTERED if any(plugins.takes_part(e, point, experiment) for point in points)]


def session(command: str, used: Iterable[plugins.Registered]) -> dict[str, Any]:
    """What makes or resumes a run: command, versions, commit, code, plug-ins, device, date."""
    return {
        "command": command or shlex.join(sys.argv),
        "versions": versions(),
        "commit": commit(),
        "code": code(),
        "plugins": [dataclasses.asdict(entry) for entry in used],
        "device": backend.device(),
        "date": datetime.date.today().isoformat(),
    }


def crc(dataset: Dataset) -> int:
    """CRC-32 of a data set's images and labels."""
    total = 0
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def new(experiment: str, study: Study, sets: Mapping[str, Dataset], command: str) -> dict[str, Any]:
    """config.json of a new run."""
    taking_part = used(study, experiment)
    idle = {name for entry in plugins.REGISTERED if entry not in taking_part for name in plugins.declared(entry)}
    config = study.sweep.as_dict()
    return {
        "schema": SCHEMA,
        "experiment": experiment,
        "config": {n: v for n, v in config.items() if n not in idle or v != FIELDS[n].default},
        **session(command, taking_part),
        "resumed": [],
        "datasets": {name: {**dataclasses.asdict(s.spec), "crc32": crc(s)} for name, s in sets.items()},
        "trials": trials(study),
    }


def trials(study: Study) -> list[dict[str, Any]]:
    """Every trial with its arm, seed and the values that have an effect on it."""
    return [{"trial": t.trial, "arm": t.arm, "seed": t.seed, "config": canonical(t.point)} for t in study.trials]


def resumed(held: dict[str, Any], now: dict[str, Any], sweep: Sweep, training: bool) -> dict[str, Any]:
    """config.json of a run that is asked for again, in the session `now`.

    What it is continued with is added to `resumed` where that differs from before and something is still to be trained.
    Another analysis takes the place of the one before; that of a finished run is `pending` until its files are written.
    """
    before = last(held)
    found = {**held, "resumed": list(held.get("resumed", []))}
    if training and (
        differing_code(before, now) or any(now[n] != before.get(n) for n in ("versions", "commit", "device"))
    ):
        found["resumed"].append(now)
    analysis = {name: getattr(sweep, name) for name in ANALYSIS}
    if any(held["config"].get(name) != value for name, value in analysis.items()):
        found["config"] = {**held["config"], **analysis}
    if found["config"] != held["config"] and not training:
        found["analysed"] = {**analysis, **{n: now[n] for n in ("versions", "commit", "date")}, "pending": True}
    return found


def analysed(held: dict[str, Any]) -> dict[str, Any]:
    """config.json after the files of its analysis were written."""
    by = {name: value for name, value in held.get("analysed", {}).items() if name != "pending"}
    return {**held, "analysed": by} if by else held


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier version in the fields of this one; fields that did not exist yet are left out."""
    if not set(config) & set(REPLACED):  # what took their place had no effect there
        return dict(config)
    kept = {"kernels": config["convolution"]} if config.get("convolution") in ("native", "products") else {}
    return {n: v for n, v in config.items() if n not in REPLACED} | kept


def differing(held: dict[str, Any], config: dict[str, Any], experiment: str, path: Path) -> None:
    """Refuse another run than the one that is held.

    A field that is newer than the run counts as its default; one that exists no more must have had no effect.

    Raises:
      InputError: it is of another experiment or config; the sentence names what differs.
    """
    old, name = translated(held["config"]), held["experiment"]
    if name != experiment:
        raise InputError(f"--workdir={path} holds a run of {name}: name another folder, or pass --overwrite.")
    own = {n: field.default for n, field in FIELDS.items()} | old
    different = [
        n for n in sorted({*own, *config}) if n not in (*UNESSENTIAL, *ANALYSIS) and own.get(n) != config.get(n)
    ]
    if unknown := [n for n in different if n not in FIELDS]:
        raise InputError(
            f"--workdir={path} holds a run with {unknown[0]}={old[unknown[0]]!r}, a field that does not exist here: "
            "name the plug-in that declares it, or another folder."
        )
    if different:
        words = "; ".join(f"{n} was {own.get(n)!r}, is now {config.get(n)!r}" for n in different)
        raise InputError(
            f"--workdir={path} holds a run of another config ({words}): name another folder, or pass --overwrite."
        )


def check_schema(held: Mapping[str, Any], path: Path) -> None:
    """Refuse files of a newer version.

    Raises:
      InputError: it is one.
    """
    schema = held.get("schema", 1)
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            f"--workdir={path} holds a run of a newer version of plastic_jax (its files have schema {schema}, this one "
            f"reads up to {SCHEMA}): use that version, or name another folder."
        )


def valid(held: Any) -> bool:
    """Whether a JSON value is a config.json, of this version or an earlier one."""
    kinds = {
        "experiment": str, "config": dict, "command": str, "versions": dict, "device": str, "date": str,
        "datasets": dict, "trials": list,
    }  # fmt: skip
    return (
        isinstance(held, dict)
        and isinstance(held.get("schema", 1), int)
        and all(isinstance(held.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(t, dict) and {"trial", "arm", "seed", "config"} <= t.keys() for t in held["trials"])
        and isinstance(held.get("resumed", []), list)
        and all(isinstance(s, dict) and {"versions", "device", "date"} <= s.keys() for s in held.get("resumed", []))
    )


def last(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run was last trained by."""
    return [held, *held.get("resumed", [])][-1]


def made_by(session: Mapping[str, Any]) -> str:
    """The code of a session in words: its commit, or the package's version outside a checkout."""
    commit, version = session.get("commit"), session["versions"].get("plastic_jax", "unknown")
    return f"commit {commit}" if commit else f"plastic_jax {version}"


def differing_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two sessions' code differs, a plug-in's included, where it can change a number."""

    def sources(by: Mapping[str, Any]) -> set[tuple[Any, ...]]:
        return {(p["kind"], p["name"], p["sha256"]) for p in by.get("plugins", [])}

    if "code" not in before:  # of an earlier version, which held the commit alone
        return str(before.get("commit")).rstrip("+") != now["commit"]
    return before["code"] != now["code"] or sources(before) != sources(now)


def changed_code(held: Mapping[str, Any], now: Mapping[str, Any], finished: bool) -> str:
    """A sentence if a run was made, or is continued, by other code than that at hand, else an empty one.

    Args:
      held: its config.json.
      now: the session in which it is asked for.
      finished: whether nothing is left to be trained.
    """
    before = last(held)
    if not differing_code(before, now):
        return ""
    by, at_hand = made_by(before), f"now {made_by(now)}"
    if made_by(now) == by:
        at_hand = "changed since"
    if finished:
        return (
            f"Trained by other code than that at hand ({by}, {at_hand}): its numbers stay as they were. To train with "
            "this code, name another folder or pass --overwrite."
        )
    return f"Begun by other code than that at hand ({by}, {at_hand}): what is left is trained by this one."


def other_layout(held: Mapping[str, Any], path: Path) -> InputError:
    """The sentence for a run that this code cannot continue."""
    return InputError(
        f"--workdir={path} holds an unfinished run of other code ({made_by(last(held))}), whose plan or states are "
        "laid out differently: finish it with that version, or name another folder; plastic_jax.load reads its table "
        "so far."
    )


def check_data(held: dict[str, Any], sets: Mapping[str, Dataset], path: Path) -> None:
    """Refuse to continue with other data than the run began with."""
    for name, dataset in sets.items():
        if held.get("datasets", {}).get(name, {}).get("crc32") != crc(dataset):
            raise InputError(
                f"--workdir={path} holds a run on other data: the files of dataset={name} have changed since it began; "
                "restore the first ones, or name another folder."
            )
