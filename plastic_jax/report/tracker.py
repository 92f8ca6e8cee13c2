"""W&B: one run per trial, grouped by arm, live or from the results table.

The results table is the truth and W&B a view of it. Online, `Tracker.log` hands a chunk's rows to a
thread, which writes them to a process of its own (`wandb_process`); offline, `Tracker.finish`
writes the runs from the table (`wandb_log`), and

    python -m plastic_jax.tracking WORKDIR

does the same for a run that was killed. Whatever goes wrong with W&B is one sentence to the user;
training neither stops nor waits for it.

What a run holds: the table's columns under their own names against `examples_seen`, so that the
panel `test_accuracy` is the paper's figure 1; the control for training time under
`tuning_continued/...`; the trial's config with `arm` and `seed`; in the summary the last values,
the arm's `gap`, its interval and verdict, and the arm's means under `arm/...`. With more than 256
trials a run is an arm, with a column per seed, `test_accuracy/seed_3`, and `test_accuracy/mean`
where every seed has the row.
"""

import configparser
import contextlib
import importlib.util
import json
import netrc
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from plastic_jax.errors import InputError
from plastic_jax.report.wandb_offline import Record, reason, write
from plastic_jax.report.wandb_runs import MODES, Content, Histories, Rows, Trial, contents_of, plan_runs

# Settings of one W&B run or service, which are not meant for the many runs started here.
_NOT_INHERITED = (
    "WANDB_LAUNCH",
    "WANDB_RESUME",
    "WANDB_RUN_ID",
    "WANDB_SERVICE",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)


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
            f"`python -m plastic_jax.tracking {shlex.quote(os.fspath(folder.parent))}` writes them "
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

    contents: list[Content]
    record: Record


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
                record = Record(self._folder)
                record.project = project
                record.save()
            except OSError as error:
                self.mode = "disabled"
                sentence = (
                    f"W&B: its folder cannot be written ({reason(error)}), so there will be no "
                    "W&B runs; training continues."
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
            contents = contents_of(self._project, left, table, summary)
            write(self._folder, self._project, contents, self._say)
        except Exception as error:
            self._say(f"W&B: the runs could not be ended ({reason(error)}).")
        finally:
            if self._process is not None:
                self._process.kill()

    def _finish_online(self, table: pd.DataFrame, summary: list[dict[str, Any]]) -> None:
        assert self._thread is not None
        deadline = time.monotonic() + self._finish_seconds
        record = Record(self._folder)
        contents = list(contents_of(self._project, self._runs, table, summary))
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
        histories = Histories(self._runs)
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
            self._fail(reason(error))
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
