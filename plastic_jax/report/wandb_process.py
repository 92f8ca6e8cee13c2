"""The process that talks to W&B while a run trains. Started by `tracking`, not imported by it.

All of `wandb` lives here: what it replaces (sys.exit, sys.excepthook), registers (atexit), waits for
(the network) and starts (its service) then cannot touch the training process, which only writes to
a pipe and can kill this one at any time. Only the standard library and wandb are imported, so it
starts at once and leaves the accelerator alone.

In, a JSON object a line:
  {"dir", "project", "init_seconds", "leave_seconds", "runs": {id: {"name", "group", "job_type",
  "config", "merged"}}}   first; a run is created when its first rows come, and after the last
                          line there are `leave_seconds` to get what is left away
  {"rows": {id: [[step, {column: value}], ...]}}
  {"finish": {id: {column: value}}}     with what to add to the runs' summaries; then end of file
Out, a JSON object a line: {"started": id, "url"}, {"finished": id}, {"failed": reason}.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

AT_ONCE = 16  # runs that are created or finished side by side: each waits for the network
AXES = ("examples_seen", "step")  # the x axis of all panels; W&B's own step, but for equal ones
# When the server refuses a running run's rows for good, wandb only prints this and goes on.
GIVEN_UP = "Fatal error while uploading data"


def _settings(wandb: Any, init_seconds: float) -> Any:
    """No banners, no upload but the rows: no code, console, git, machine or system statistics."""
    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=init_seconds,
        label_disable=True,
        quiet=True,
        save_code=False,
        silent=True,
        stop_fn=lambda: None,  # 'stop run' in the browser: one trial cannot stop its neighbours
        symlink=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_skip_transaction_log=True,  # the results table is ours; a full disk then costs no rows
    )


class _Prints:
    """Standard error, which notices when wandb gives a run up."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.given_up = False

    def write(self, text: str) -> int:
        self.given_up |= GIVEN_UP in text
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Runs:
    """The W&B runs of one training run, each created when its first rows come."""

    def __init__(self, start: dict[str, Any], prints: _Prints, events: TextIO):
        self.wandb: Any = None  # the module, once it is imported
        self._prints = prints
        self._start = start
        self._events = events
        self._lock = threading.Lock()
        self._runs: dict[str, Any] = {}
        self._next: dict[str, int] = {}
        self._defined: dict[str, set[str]] = {}

    def tell(self, **event: Any) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):  # training may be gone
            self._events.write(json.dumps(event) + "\n")
            self._events.flush()

    def _check(self) -> None:
        if self._prints.given_up:
            raise ConnectionError("W&B refused the rows (see wandb_process.log in its folder)")

    def _create(self, name: str) -> None:
        run, folder = self._start["runs"][name], self._start["dir"]
        # A folder of an earlier process of this workdir: go on. Without one, an old run of this id
        # comes from elsewhere and is replaced.
        resumed = any(Path(folder, "wandb").glob(f"run-*-{name}"))
        made = self.wandb.init(
            config=run["config"],
            dir=folder,
            group=run["group"],
            id=name,
            job_type=run["job_type"],
            mode="online",
            name=run["name"],
            project=self._start["project"],
            reinit="create_new",
            resume="allow" if resumed else None,
            settings=_settings(self.wandb, self._start["init_seconds"]),
        )
        for axis in AXES:
            made.define_metric(axis, hidden=True)
        self._runs[name], self._next[name] = made, made.starting_step
        self._defined[name] = set(AXES)
        self.tell(started=name, url=made.project_url)

    def rows(self, portions: dict[str, list[tuple[int, dict[str, Any]]]]) -> None:
        self._side_by_side(self._create, [name for name in portions if name not in self._runs])
        self._check()
        for name, rows in portions.items():
            merged = self._start["runs"][name]["merged"]
            for step, values in rows:
                if step < self._next[name]:  # a resumed run has these rows already ...
                    if not merged:
                        continue
                    step = self._next[name]  # ... or has been ahead with other seeds
                # Each by its name: a glob ends up in the run's config as a glob, not as metrics.
                for column in values.keys() - self._defined[name]:
                    self._runs[name].define_metric(column, step_metric=AXES[0])
                self._defined[name] |= values.keys()
                self._runs[name].log(values, step=step, commit=True)
                self._next[name] = step + 1

    def finish(self, summaries: dict[str, dict[str, Any]]) -> None:
        def finish(name: str) -> None:
            self._runs[name].summary.update(summaries[name])
            self._runs[name].finish()
            self._check()
            self.tell(finished=name)

        self._side_by_side(finish, [name for name in summaries if name in self._runs])

    def abandon(self) -> None:
        """Training ended without a message: mark its runs as failed, once their rows are uploaded."""
        self._side_by_side(lambda name: self._runs[name].finish(exit_code=1), list(self._runs))

    def _side_by_side(self, function: Any, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(function, names))


def main() -> None:
    """Do what the lines say; ends the process itself, with 0 if W&B took everything."""
    # The service process inherits 0, 1 and 2: give it the log, and keep the two pipes to ourselves.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    lines = (json.loads(line) for line in os.fdopen(os.dup(0), "rb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    start = next(lines)
    os.nice(10)  # training comes first
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each run holds about three
    prints = _Prints(sys.stderr)
    sys.stderr = prints  # type: ignore[assignment]
    runs = _Runs(start, prints, events)
    code = 1
    try:
        runs.wandb = importlib.import_module("wandb")
        finished = False
        for line in lines:
            if "rows" in line:
                runs.rows(line["rows"])
            else:
                runs.finish(line["finish"])
                finished = True
        timer = threading.Timer(start["leave_seconds"], os._exit, (1,))
        timer.daemon = True
        timer.start()
        if not finished:
            runs.abandon()
        runs.wandb.teardown()
        code = 0
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]  # what follows is advice
        runs.tell(failed=f"{type(error).__name__}: {reason}"[:300])
    # If the service process is still there, it ends with this one; wandb's hooks could wait for it.
    os._exit(code)


if __name__ == "__main__":
    main()
