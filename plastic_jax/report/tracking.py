"""W&B: one run per trial, grouped by arm, live or from the results table.

The results table is the truth and W&B a view of it. Online, `Tracker.log` hands a chunk's rows to a
thread, which writes them to a process of its own (`wandb_process`); offline, `Tracker.finish`
writes the runs from the table (`wandb_log`), and

    python -m plastic_jax.report.tracking WORKDIR

does the same for a run that was killed. Whatever goes wrong with W&B is one sentence to the user;
training neither stops nor waits for it.

What a run holds: the table's columns under their own names against `examples_seen`, so that the
panel `test_accuracy` is the paper's figure 1; the control for training time under
`tuning_continued/...`; the trial's config with `arm` and `seed`; in the summary the last values,
the arm's `gap`, its interval and verdict, and the arm's means under `arm/...`. With more than 256
trials a run is an arm, with a column per seed, `test_accuracy/seed_3`, and `test_accuracy/mean`
where every seed has the row.
"""

import argparse
import configparser
import contextlib
import hashlib
import importlib.util
import json
import math
import netrc
import numbers
import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from plastic_jax.errors import InputError
from plastic_jax.report import wandb_log
from plastic_jax.results import tables

MODES = ("auto", "online", "offline", "disabled")
MOST_TRIALS = 256  # above it, a W&B run is an arm
PROJECT = "plastic_jax"  # where none is named
LONGEST_NAME = 128  # that W&B takes

AXES = ("stage", "epoch", "step", "examples_seen")
_IDENTITY = frozenset({"trial", "arm", "seed"})  # a run's name, group and config say these
_RECORD = "plastic_jax.json"
# Settings of one W&B run or service, which are not meant for the many runs started here.
_NOT_INHERITED = (
    "WANDB_LAUNCH",
    "WANDB_RESUME",
    "WANDB_RUN_ID",
    "WANDB_SERVICE",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)

Rows = list[tuple[int, dict[str, Any]]]
"""A portion of a W&B history: (step, column -> value), steps strictly increasing."""


@dataclass(frozen=True)
class Trial:
    """What W&B is told of a trial: its number in the results table and its own config (flat)."""

    trial: int
    arm: str
    seed: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A W&B run: one trial, or one arm (`merged`)."""

    id: str
    name: str
    group: str
    job_type: str
    config: dict[str, Any]
    trials: tuple[Trial, ...]
    merged: bool


def run_id(experiment: str, config: Mapping[str, Any], seed: int | Sequence[int]) -> str:
    """The same id for the same experiment, config and seed (of an arm: seeds), wherever it runs."""
    text = json.dumps([experiment, dict(config), seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_runs(experiment: str, trials: Sequence[Trial]) -> tuple[Run, ...]:
    """One run per trial, or one per arm where there are more than MOST_TRIALS trials."""
    merged = len(trials) > MOST_TRIALS
    members: dict[Any, list[Trial]] = {}
    for trial in trials:
        members.setdefault(trial.arm if merged else trial.trial, []).append(trial)
    runs: dict[str, Run] = {}
    for group in members.values():
        first = group[0]
        seeds = [trial.seed for trial in group]
        named = {"arm": first.arm, "seed": seeds if merged else first.seed}
        config = json.loads(json.dumps(first.config, default=str)) | named
        key = run_id(experiment, first.config, seeds if merged else first.seed)
        if key in runs:  # equal trials under two names
            key = run_id(experiment, config | {"trial": first.trial}, first.seed)
        ending = "" if merged else f", seed={first.seed}"
        name = _cut(first.arm, LONGEST_NAME - len(ending)) + ending
        arm = _cut(first.arm, LONGEST_NAME)
        runs[key] = Run(key, name, arm, experiment, config, tuple(group), merged)
    return tuple(runs.values())


def _cut(name: str, most: int) -> str:
    """A name of at most `most` characters, still different from other long ones."""
    if len(name) <= most:
        return name
    return f"{name[: most - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plain(value: Any) -> Any:
    """A value as W&B takes it; None for what is not logged: gaps, NaN, infinities and False."""
    kind = type(value)  # the usual kinds first: there are many values
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is int or kind is str:
        return value
    if isinstance(value, bool | np.bool_):
        return 1 if value else None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return None


class _Histories:
    """Turns rows of the results table into W&B histories, in any number of portions."""

    def __init__(self, runs: Iterable[Run]):
        self._of = {
            trial.trial: (run, trial.seed, _IDENTITY | trial.config.keys() - {*AXES})
            for run in runs
            for trial in run.trials
        }
        self.last: dict[str, int] = {}  # step by run id
        self._incomplete: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def take(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Rows]:
        """The next rows of each run's history; rows of a trial come in the order of training."""
        taken: dict[str, dict[Any, dict[str, Any]]] = {}
        for row in rows:
            if row["trial"] not in self._of:
                continue
            run, seed, skipped = self._of[row["trial"]]
            values = {
                name: plain
                for name, value in row.items()
                if name not in skipped and (plain := _plain(value)) is not None
            }
            axes = {name: values.pop(name) for name in AXES if name in values}
            if axes.get("stage") == tables.CONTINUED:
                values = {f"{tables.CONTINUED}/{name}": value for name, value in values.items()}
            portion = taken.setdefault(run.id, {})
            if not run.merged:
                portion[len(portion)] = axes | values
                continue
            key = (axes["step"], axes.get("stage", ""), axes["examples_seen"], axes.get("epoch", 0))
            merged = portion.setdefault(key, axes)
            merged |= {f"{name}/seed_{seed}": value for name, value in values.items()}
            merged |= self._means(run, key, values)
        return {
            name: [(self._step(name, row["step"]), row) for _, row in sorted(portion.items())]
            for name, portion in taken.items()
        }

    def _means(self, run: Run, key: Any, values: dict[str, Any]) -> dict[str, float]:
        """The columns' means over the arm's seeds, once all of them have had this row."""
        so_far = self._incomplete.setdefault((run.id, *key), [])
        so_far.append(values)
        if len(so_far) < len(run.trials):
            return {}
        del self._incomplete[run.id, *key]
        columns: dict[str, list[float]] = {}
        for of_seed in so_far:
            for name, value in of_seed.items():
                columns.setdefault(name, []).append(value)
        return {f"{name}/mean": statistics.fmean(column) for name, column in columns.items()}

    def _step(self, name: str, step: int) -> int:
        """W&B drops a row whose step is not above the last one: two stages meet at one step."""
        self.last[name] = max(step, self.last.get(name, -1) + 1)
        return self.last[name]


@dataclass(frozen=True)
class _Content:
    """All that W&B is to hold of a run; `summary` is what comes on top of the last values."""

    run: Run
    rows: Rows
    summary: dict[str, Any]
    digest: str


def _contents(
    project: str, runs: Iterable[Run], table: pd.DataFrame, summary: Iterable[dict[str, Any]]
) -> Iterator[_Content]:
    """The runs that have rows in the results table."""
    arms = {entry["arm"]: entry for entry in summary}
    places = table.groupby("trial").indices
    steps = table["step"].to_numpy()
    columns = {name: np.array(table[name].tolist(), dtype=object) for name in table.columns}
    for run in runs:
        rows: list[dict[str, Any]] = []
        for trial in run.trials:
            at = places.get(trial.trial, np.array([], dtype=int))
            at = at[np.argsort(steps[at], kind="stable")]
            cells = zip(*(column[at].tolist() for column in columns.values()), strict=True)
            rows += [dict(zip(columns, row, strict=True)) for row in cells]
        if not rows:
            continue
        history = _Histories([run]).take(rows)[run.id]
        added = _arm_summary(run, arms.get(run.trials[0].arm, {}))
        said = [project, run.name, run.group, run.job_type, run.config, history, added]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        yield _Content(run, history, added, digest)


def _arm_summary(run: Run, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's entry of summary.json: the gap under its own name, the arm's means under `arm/`."""
    added: dict[str, Any] = {}
    for name, value in entry.items():
        if name in run.config:
            continue
        key = name if name.startswith(("gap", "pairs", "verdict")) else f"arm/{name}"
        if isinstance(value, list | tuple) and len(value) == 2:
            added |= {f"{key}_low": _plain(value[0]), f"{key}_high": _plain(value[1])}
        else:
            added[key] = int(value) if isinstance(value, bool) else _plain(value)
    return {name: value for name, value in added.items() if value is not None}


class _Record:
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

    def has(self, content: _Content) -> bool:
        return self._digests.get(content.run.id) == content.digest

    def has_online(self, content: _Content) -> bool:
        return self.has(content) and content.run.id in self._online

    def add(self, content: _Content, online: bool) -> None:
        self._digests[content.run.id] = content.digest
        (self._online.add if online else self._online.discard)(content.run.id)

    def save(self) -> None:
        content = {
            "project": self.project,
            "written": self._digests,
            "online": sorted(self._online),
        }
        tables.replace_file(self._path, json.dumps(content, indent=1).encode())


def _write(folder: Path, project: str, contents: Iterable[_Content], say: Callable[[str], None]) -> bool:
    """Write runs into WORKDIR/wandb, each id once; True if all are there. Says how it went."""
    record = _Record(folder)
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
        trouble = _reason(error)
    try:
        if written:
            record.save()
    except OSError as error:
        trouble = trouble or _reason(error)
    where = shlex.quote(os.fspath(folder))
    if trouble:
        again = shlex.quote(os.fspath(folder.parent))
        say(
            f"W&B: {written} runs were written to {where}, then it failed ({trouble}); "
            f"results.parquet holds everything, and `python -m plastic_jax.report.tracking {again}` "
            "writes the rest."
        )
        return False
    if written or kept:
        already = f" ({kept} of them from before)" if kept else ""
        say(f"W&B: {written + kept} runs are in {where}{already}; upload them with `wandb sync {where}`.")
    return True


def _write_run(folder: Path, stamp: str, project: str, content: _Content) -> None:
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


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def write_offline(
    workdir: str | os.PathLike[str],
    say: Callable[[str], None] = print,
    project: str | None = None,
) -> bool:
    """Write a workdir's W&B runs from its results table, each id once; True if all are there.

    Without a `summary.json`, as a killed run leaves it, the gap is missing from the summaries.
    Raises InputError if `workdir` is none.
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
    project = project or _Record(folder).project or PROJECT
    contents = _contents(project, plan_runs(experiment, trials), table, summary)
    return _write(folder, project, contents, say)


def _choose_mode(mode: str, folder: Path) -> tuple[str, str]:
    """The mode to run in, and the sentence to say about it, if any."""
    if mode not in MODES:
        raise InputError(f"--wandb={mode} is not known; allowed are {', '.join(MODES)}")
    asked = os.environ.get("WANDB_MODE", "") if mode == "auto" else mode
    if asked == "disabled":
        return "disabled", ""
    if importlib.util.find_spec("wandb") is None:
        return "disabled", (
            "W&B: the package wandb is not installed, so no runs are written; once it is, "
            f"`python -m plastic_jax.report.tracking {shlex.quote(os.fspath(folder.parent))}` writes them "
            "from the results table."
        )
    if asked in ("offline", "dryrun"):
        return "offline", ""
    if not _has_key():
        return "offline", (
            "W&B: no API key is configured (WANDB_API_KEY or `wandb login`), so the runs are "
            "written when training has ended; then "
            f"`wandb sync {shlex.quote(os.fspath(folder))}` uploads them. --wandb=disabled turns "
            "this off."
        )
    return "online", ""


def _has_key() -> bool:
    """Whether W&B would find a key, without importing it: the variable, its settings, netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # W&B says so itself
        settings.read(Path(folder).expanduser() / "settings")
    if settings.get("default", "api_key", fallback=""):
        return True
    url = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or url).netloc
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if name and (path := Path(name).expanduser()).exists():
            try:
                entry = netrc.netrc(path).authenticators(host)
            except (netrc.NetrcParseError, OSError):
                return False
            return bool(entry and entry[2])
    return False


class _Process:
    """The process that talks to W&B, and the thread that hears it."""

    def __init__(self, log: Path, heard: Callable[[dict[str, Any]], None]):
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        environment.setdefault("WANDB_ERROR_REPORTING", "false")
        environment["PYTHONWARNINGS"] = "ignore"
        script = Path(__file__).with_name("wandb_process.py")
        with open(log, "ab") as trace:
            self._popen = subprocess.Popen(
                # -P: the script's own folder is not one to import from
                [sys.executable, "-P", os.fspath(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=trace,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training, which then closes the pipe
            )
        self._heard = heard
        self._listener = threading.Thread(target=self._listen, name="wandb-events", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                self._heard(json.loads(line))

    def send(self, message: dict[str, Any]) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(message).encode() + b"\n")
        self._popen.stdin.flush()

    def close(self) -> int:
        """No more messages: wait until the process has done all of them; its exit code."""
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already, and its code says how
            self._popen.stdin.close()
        self._listener.join()
        return self._popen.wait()

    def kill(self) -> None:
        self._popen.kill()


@dataclass(frozen=True)
class _Ending:
    """The last message to the tracker's thread."""

    contents: list[_Content]
    record: _Record


class Tracker:
    """A training run's W&B runs. No method waits for W&B longer than it says, none raises.

    `mode` is one of MODES; auto is online if a key is configured and WANDB_MODE says nothing else,
    otherwise offline. W&B's files go to `workdir`/wandb. `say` prints one sentence to the user; it
    is also called from other threads. `finish` gives an online run's last rows `finish_seconds`
    to arrive, and W&B has `init_seconds` to answer when a run is created.
    """

    def __init__(
        self,
        mode: str,
        workdir: str | os.PathLike[str],
        project: str,
        experiment: str,
        trials: Sequence[Trial],
        say: Callable[[str], None],
        finish_seconds: float = 60.0,
        init_seconds: float = 20.0,
    ):
        self._folder = Path(workdir).absolute() / "wandb"
        self._project = project
        self._say = say
        self._finish_seconds = finish_seconds
        self._init_seconds = init_seconds
        self._runs = plan_runs(experiment, trials)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failed = False
        self._finished: set[str] = set()  # run ids
        self._url = ""
        self._process: _Process | None = None
        self._thread: threading.Thread | None = None
        self.mode, sentence = _choose_mode(mode, self._folder)
        if self.mode != "disabled":
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                record = _Record(self._folder)
                record.project = project
                record.save()
            except OSError as error:
                self.mode = "disabled"
                sentence = (
                    f"W&B: its folder cannot be written ({_reason(error)}), so there will be no "
                    "W&B runs; training goes on."
                )
        if sentence:
            say(sentence)
        if self.mode == "online":
            self._thread = threading.Thread(target=self._serve, name="wandb-rows", daemon=True)
            self._thread.start()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Hand over rows of the results table, at a chunk's end; returns at once.

        The rows of a trial come in the order of training. After a resume, rows that W&B already
        has may come again.
        """
        if self._thread is not None and not self._failed:
            self._queue.put(list(rows))

    def finish(self, table: pd.DataFrame, summary: list[dict[str, Any]]) -> None:
        """End the runs: upload what is left and the summaries, or write them all from the table.

        `table` and `summary` are results.parquet and summary.json. An online run that W&B has not
        taken whole within the time is written offline as well.
        """
        if self.mode == "disabled":
            return
        try:
            if self._thread is not None:
                self._finish_online(table, summary)
            if self._finished:
                self._say(f"W&B: {len(self._finished)} runs are complete{self._url}.")
            left = [run for run in self._runs if run.id not in self._finished]
            contents = _contents(self._project, left, table, summary)
            _write(self._folder, self._project, contents, self._say)
        except Exception as error:
            self._say(f"W&B: the runs could not be ended ({_reason(error)}).")
        finally:
            if self._process is not None:
                self._process.kill()

    def _finish_online(self, table: pd.DataFrame, summary: list[dict[str, Any]]) -> None:
        assert self._thread is not None
        deadline = time.monotonic() + self._finish_seconds
        record = _Record(self._folder)
        contents = list(_contents(self._project, self._runs, table, summary))
        self._queue.put(_Ending(contents, record))
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._fail(f"not everything was uploaded after {self._finish_seconds:g} s")
            self._thread.join(5)
        for content in contents:
            if content.run.id in self._finished:
                record.add(content, online=True)
        with contextlib.suppress(OSError):  # without it they would be sent once more, no worse
            record.save()

    def _serve(self) -> None:
        """The tracker's own thread: starts the process and feeds it."""
        start = {
            "dir": os.fspath(self._folder.parent),
            "project": self._project,
            "init_seconds": self._init_seconds,
            "leave_seconds": self._finish_seconds,
            "runs": {
                run.id: {
                    "name": run.name,
                    "group": run.group,
                    "job_type": run.job_type,
                    "config": run.config,
                    "merged": run.merged,
                }
                for run in self._runs
            },
        }
        histories = _Histories(self._runs)
        process = None
        try:
            process = self._process = _Process(self._folder / "wandb_process.log", self._hear)
            process.send(start)
            while not self._failed and (message := self._queue.get()) is not None:
                if isinstance(message, _Ending):
                    self._end(process, message, histories.last)
                    break
                process.send({"rows": histories.take(message)})
        except BrokenPipeError:
            pass  # the process has ended, and says why or has a code
        except Exception as error:
            self._fail(_reason(error))
        if process is not None:
            code = process.close()
            if code:
                self._fail(f"its process ended with code {code}")

    def _end(self, process: _Process, ending: _Ending, last: dict[str, int]) -> None:
        """Send what training has not handed over, and the summaries."""
        rows: dict[str, Rows] = {}
        summaries: dict[str, dict[str, Any]] = {}
        for content in ending.contents:
            name = content.run.id
            if name not in last:
                if ending.record.has_online(content):  # from an earlier process of this workdir
                    self._finished.add(name)
                    continue
                rows[name] = content.rows
            elif not content.run.merged:
                rows[name] = [(step, row) for step, row in content.rows if step > last[name]]
            summaries[name] = content.summary
        process.send({"rows": rows})
        process.send({"finish": summaries})

    def _hear(self, event: dict[str, Any]) -> None:
        if "failed" in event:
            self._fail(event["failed"])
        elif "finished" in event:
            self._finished.add(event["finished"])
        elif event.get("url") and not self._url:
            self._url = f" at {event['url']}"
            self._say(f"W&B: the runs are live{self._url}, grouped by arm.")

    def _fail(self, reason: str) -> None:
        """W&B is given up for this process: say so, once, and end what talks to it."""
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            self._say(
                f"W&B: {reason.rstrip('.')}; training is not affected, and the runs will be "
                "written from the results table at the end."
            )
        self._queue.put(None)
        if self._process is not None:
            self._process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all runs are written, 1 if not, 2 if the argument is no workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m plastic_jax.report.tracking",
        description="Write a workdir's W&B runs from its results table, each once, for wandb sync.",
    )
    parser.add_argument("workdir", help="the --workdir of a run, also of a killed one")
    parser.add_argument("--project", help="W&B project; default: the run's own")
    flags = parser.parse_args(arguments)
    try:
        return 0 if write_offline(flags.workdir, project=flags.project) else 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
