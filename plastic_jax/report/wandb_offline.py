"""W&B's offline runs, written from the table of a finished or killed run."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from plastic_jax import files
from plastic_jax.errors import InputError
from plastic_jax.report import wandb_log
from plastic_jax.report.wandb_runs import PROJECT, Content, Trial, contents_of, plan_runs
from plastic_jax.results import tables

_RECORD = "plastic_jax.json"


class Record:
    """WORKDIR/wandb/plastic_jax.json: what W&B has of this workdir, by run id."""

    def __init__(self, folder: Path):
        self._path = folder / _RECORD
        self.project: str | None = None
        self._digests: dict[str, str] = {}
        self._online: set[str] = set()
        try:
            content = json.loads(self._path.read_text())
            self.project = content["project"]
            self._digests = dict(content["written"])
            self._online = set(content["online"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or not ours: write everything

    def has(self, content: Content) -> bool:
        """Whether this very content has been written."""
        return self._digests.get(content.run.id) == content.digest

    def has_online(self, content: Content) -> bool:
        """Whether W&B itself has it."""
        return self.has(content) and content.run.id in self._online

    def add(self, content: Content, online: bool) -> None:
        """Note that it has been written."""
        self._digests[content.run.id] = content.digest
        (self._online.add if online else self._online.discard)(content.run.id)

    def save(self) -> None:
        """Write the record."""
        content = {
            "project": self.project,
            "written": self._digests,
            "online": sorted(self._online),
        }
        files.replace_file(self._path, json.dumps(content, indent=1).encode())


def write(folder: Path, project: str, contents: Iterable[Content], say: Callable[[str], None]) -> bool:
    """Write runs into WORKDIR/wandb, each id once; True if all are there. Says how it went."""
    record = Record(folder)
    record.project = project
    written = kept = 0
    trouble = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older: dict[str, list[Path]] = {}
        for path in folder.glob("offline-run-*"):
            older.setdefault(path.name.split("-")[3], []).append(path)
        stamp = time.strftime("%Y%m%d_%H%M%S")
        for content in contents:
            if record.has(content):
                kept += not record.has_online(content)
                continue
            _write_run(folder, stamp, project, content)
            record.add(content, online=False)
            written += 1
            for path in older.get(content.run.id, ()):  # what the table said before
                shutil.rmtree(path, ignore_errors=True)
    except Exception as error:
        trouble = reason(error)
    try:
        if written:
            record.save()
    except OSError as error:
        trouble = trouble or reason(error)
    where = shlex.quote(os.fspath(folder))
    if trouble:
        again = shlex.quote(os.fspath(folder.parent))
        say(
            f"W&B: {written} runs were written to {where}, then it failed ({trouble}); "
            f"results.parquet holds everything, and `python -m plastic_jax.tracking {again}` "
            "writes the rest."
        )
        return False
    if written or kept:
        already = f" ({kept} of them from before)" if kept else ""
        say(f"W&B: {written + kept} runs are in {where}{already}; upload them with `wandb sync {where}`.")
    return True


def _write_run(folder: Path, stamp: str, project: str, content: Content) -> None:
    """One offline run under the name that W&B itself would give it; all of it or nothing."""
    run, number = content.run, 0
    home = folder / f"offline-run-{stamp}-{run.id}"
    while home.exists():
        number += 1
        home = folder / f"offline-run-{stamp}-{run.id}-{number}"
    described = {
        "id": run.id,
        "project": project,
        "name": run.name,
        "group": run.group,
        "job_type": run.job_type,
        "config": run.config,
    }
    try:
        (home / "files").mkdir(parents=True)
        wandb_log.write(home / f"run-{run.id}.wandb", described, content.rows, content.summary)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def reason(error: BaseException) -> str:
    """What failed, in one line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def write_offline(
    workdir: str | os.PathLike[str],
    say: Callable[[str], None] = print,
    project: str | None = None,
) -> bool:
    """Write a workdir's W&B runs from its results table, each id once; True if all are there.

    Without a `summary.json`, as a killed run leaves it, the gap is missing from the summaries.
    Raises InputError if `workdir` is not one.
    """
    workdir = Path(workdir)
    try:
        config = json.loads((workdir / "config.json").read_text())
        experiment = config["experiment"]
        trials = [Trial(entry["trial"], entry["arm"], entry["seed"], entry["config"]) for entry in config["trials"]]
    except FileNotFoundError:
        raise InputError(f"{os.fspath(workdir)!r} is no workdir: no config.json in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{os.fspath(workdir)!r} is no workdir: its config.json cannot be used ({type(error).__name__}: {error})"
        ) from error
    table = tables.read(workdir / "results.parquet")
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        summary = []
    folder = workdir / "wandb"
    project = project or Record(folder).project or PROJECT
    contents = contents_of(project, plan_runs(experiment, trials), table, summary)
    return write(folder, project, contents, say)
