"""A run's folder: who may write in it, and what a resumption is compared with."""

import fcntl
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plastic_jax.errors import InputError
from plastic_jax.files import replace_file
from plastic_jax.results import tables
from plastic_jax.running import manifest
from plastic_jax.running.checkpoint import Checkpoints
from plastic_jax.study.config import Sweep
from plastic_jax.train.trial_axis import Formulation

OWN = ("config.json", "plan.json", "results.parquet", "summary.json", "report.html", "figures", "checkpoints", "wandb")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Make the folder if it is missing and lock it; a refused command leaves no new folder.

    Raises:
      InputError: it cannot be written, or another process runs in it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
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
        try:
            yield path
        except InputError:
            if made and [file.name for file in path.iterdir()] == [".lock"]:
                (path / ".lock").unlink()
                for folder in made:
                    with suppress(OSError):  # somebody else's by now
                        folder.rmdir()
            raise


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
    """Remove the files of a run, and nothing else."""
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
            f"{path} is damaged or unreadable ({type(error).__name__}): run the command that made it again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Held:
    """A run that a folder holds: config.json, and the formulations of plan.json; None for a program of an earlier form.

    `rebuilt`: one of them was missing or damaged, and comes from the checkpoint.
    """

    config: dict[str, Any]
    formulations: Sequence[Formulation | None]
    rebuilt: bool = False


def held(path: Path, sweep: Sweep, experiment: str, say: Callable[[str], None]) -> Held | None:
    """The run that the folder holds, which is the one asked for; None where it holds none.

    Raises:
      InputError: it holds another run or one of a newer version, or files that neither say what they are nor have a
        checkpoint that does.
    """
    plan = _json(path / "plan.json")
    config, forms = read_config(path), _formulations(plan.get("programs") if isinstance(plan, dict) else None)
    if config is not None:
        manifest.differing(config, sweep.as_dict(), experiment, path)
    if config is not None and forms is not None:
        return Held(config, forms)
    kept = of_checkpoint(path, say)
    if kept is not None:
        manifest.differing(kept["config"], sweep.as_dict(), experiment, path)
        forms = _formulations([{"formulation": form} for form in kept["formulations"]])
        if forms is None:
            raise manifest.other_layout(kept["config"], path)
        return Held(config or kept["config"], forms, rebuilt=True)
    left = [name for name in OWN if (path / name).exists() and name not in ("plan.json", "config.json")]
    if left:
        names = [name for name, found in (("config.json", config), ("plan.json", forms)) if found is None]
        raise InputError(
            f"--workdir={path} holds {', '.join(left)}, but no readable {' and no readable '.join(names)}, and no "
            "checkpoint that has their content: restore them, or name another folder."
        )
    return None  # it stopped before the first checkpoint: nothing was computed


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json of a folder, None where there is none or it is damaged.

    Raises:
      InputError: it is of a newer version.
    """
    found = _json(path / "config.json")
    if isinstance(found, dict):
        manifest.check_schema(found, path)
    return found if manifest.valid(found) else None


def ended(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run of a folder has ended and was analysed."""
    return (path / "summary.json").exists() and not config.get("analysed", {}).get("pending")


def trained(path: Path, trials: Collection[int]) -> bool:
    """Whether the run of a folder had ended once, and its table is whole: it needs no checkpoint any more."""
    if not (path / "summary.json").exists():
        return False
    try:
        return set(tables.read(path / "results.parquet")["trial"]) == set(trials)
    except InputError:
        return False


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _formulations(programs: Any) -> list[Formulation | None] | None:
    """Those of a plan.json's programs, which a run keeps (contract 1); None where they are damaged."""
    try:
        forms = [program["formulation"] for program in programs]
        return [None if "trial_axis" in form else Formulation(**form) for form in forms]
    except (TypeError, KeyError):
        return None


def of_checkpoint(path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What the newest checkpoint says of its run: `config`, config.json but for the trials, and `formulations`."""
    folder = path / "checkpoints" / "run"
    if not folder.exists():
        return None
    checkpoints = Checkpoints(folder)
    try:
        found = checkpoints.restore(say)
    finally:
        checkpoints.close()
    return found[1].get("manifest") if found else None
