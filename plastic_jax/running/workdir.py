"""A run's folder: who may write in it, and what a resumption is compared with."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plastic_jax.errors import InputError
from plastic_jax.results.tables import replace_file
from plastic_jax.study.config import FIELDS, REPLACED, UNESSENTIAL

OWN = ("config.json", "plan.json", "results.parquet", "summary.json", "report.html", "figures", "checkpoints", "wandb")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Make the folder if need be and hold it alone.

    Raises:
      InputError: it cannot be written, or another process runs in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"--workdir={path} cannot be written ({error.strerror or error}): name a folder that can be made or "
            "written."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"--workdir={path} is in use by a running process: wait for it to end, or name another folder."
            ) from None
        yield path


def check_own(path: Path) -> None:
    """Refuse to start anew in a folder whose files are not a run's.

    Raises:
      InputError: it has files of a run's names, but no config.json of a run.
    """
    held = [name for name in OWN if (path / name).exists() and name != "plan.json"]
    try:
        ours = {"experiment", "config"} <= json.loads((path / "config.json").read_text()).keys()
    except FileNotFoundError:
        ours = not held
    except (OSError, ValueError, AttributeError):  # damaged: a run's, if there is what else a run leaves
        ours = (path / "plan.json").exists()
    if not ours:
        raise InputError(f"--workdir={path} holds {', '.join(held)}, which no run left there: name another folder.")


def clear(path: Path) -> None:
    """Remove what a run leaves there, and nothing else."""
    for name in ("checkpoints/run", "checkpoints/kept", "wandb"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (*OWN, "checkpoints/run.json", "figures/gap.png", "figures/accuracy_curves.png"):
        if not (path / name).is_dir():
            (path / name).unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """A JSON file of a workdir, or an `InputError` that says it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or unreadable ({type(error).__name__}): pass --overwrite to start anew."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def same_config(path: Path, config: dict[str, Any], experiment: str) -> bool:
    """Whether the folder holds a run of this very config; False where it holds none.

    Raises:
      InputError: it holds a run of another config; the sentence names the fields that differ.
    """
    file = path / "config.json"
    if not file.exists():
        taken = [name for name in OWN if (path / name).exists() and name != "plan.json"]
        if taken:
            raise InputError(f"--workdir={path} holds {', '.join(taken)} but no config.json: name another folder.")
        return False
    held = read_json(file)
    try:
        old, name = held["config"], held["experiment"]
        if set(old) & set(REPLACED):  # an earlier version's: what is new since then had no effect there
            convolution = old.get("convolution")
            kept = {"kernels": convolution} if convolution in ("native", "products") else {}
            old = {n: v for n, v in old.items() if n not in REPLACED} | kept
            old = {n: f.default for n, f in FIELDS.items() if n not in old} | old
        differing = [n for n in sorted({*old, *config}) if old.get(n) != config.get(n) and n not in UNESSENTIAL]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{file} is damaged: pass --overwrite to start anew.") from None
    if name != experiment:
        raise InputError(f"--workdir={path} holds a run of {name}: name another folder, or pass --overwrite.")
    if differing:
        words = "; ".join(f"{n} was {old.get(n)!r}, is now {config.get(n)!r}" for n in differing)
        raise InputError(
            f"--workdir={path} holds a run of another config ({words}): name another folder, or pass --overwrite."
        )
    return True
