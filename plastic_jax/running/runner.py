"""A run from config to report: what an entry point does, and `plastic_jax.run`."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from plastic_jax import backend, data
from plastic_jax.errors import InputError
from plastic_jax.report import figures, page, tracking
from plastic_jax.results import rows, tables
from plastic_jax.running import experiment, workdir
from plastic_jax.running.checkpoint import Checkpoints
from plastic_jax.running.dry_run import describe, table_of
from plastic_jax.running.loading import Run, load
from plastic_jax.study import plan, plugins, trial
from plastic_jax.study.config import Sweep, canonical
from plastic_jax.train.program import ProgramRun
from plastic_jax.train.schedule import Records
from plastic_jax.train.trial_axis import Formulation

PACKAGES = ("plastic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Interrupted(Exception):
    """The process was asked to stop; everything computed is in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is no part of the config: where to read, write and log, and how."""

    workdir: str | None = None
    data_dir: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    wandb: str = "auto"
    device_memory_gib: float = 0.0
    command: str = ""
    progress: bool = True


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
    """The checkout's commit, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True)  # noqa: E731
        head = git("rev-parse", "HEAD").stdout.strip()
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def default_workdir(name: str, sweep: Sweep) -> Path:
    """runs/NAME-HASH: the same config comes back to the same folder."""
    text = json.dumps(sweep.as_dict(), sort_keys=True)
    return Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run(
    config: Mapping[str, Any],
    workdir: str | os.PathLike[str] | None = None,
    *,
    study: experiment.Experiment | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Run | None:
    """Train a sweep and report it, as an entry point does.

    Args:
      config: a value or a sequence of values for each field; the others take their defaults.
      workdir: the run's folder; the same call on the same folder goes on where it stopped.
      study: the experiment, by default the warm-start study.
      say: takes each sentence meant for the user.
      **options: fields of `Options`, such as data_dir, dry_run, overwrite, wandb.

    Returns:
      The finished run as `plastic_jax.load` gives it; None after a dry run.

    Raises:
      InputError: bad input, before any work has started.
    """
    chosen = Options(workdir=None if workdir is None else os.fspath(workdir), **options)
    return _run(study or experiment.Experiment(), Sweep.of(config), chosen, say)


def _run(of: experiment.Experiment, sweep: Sweep, options: Options, say: Callable[[str], None]) -> Run | None:
    backend.prepare()
    specs = {name: data.spec(name, options.data_dir) for name in sweep.values["dataset"]}
    study = trial.study(sweep, specs, of.fresh)
    programs = plan.programs(study)
    path = (Path(options.workdir) if options.workdir else default_workdir(of.name, sweep)).absolute()  # Orbax's wish
    if options.wandb not in tracking.MODES:
        raise InputError(f"--wandb={options.wandb!r} is not allowed: one of {', '.join(tracking.MODES)}.")
    double = "float64" in sweep.values["compute_dtype"]
    with workdir.opened(path), jax.enable_x64(True) if double else contextlib.nullcontext():
        if options.overwrite:
            workdir.check_own(path)
        going_on = not options.overwrite and workdir.same_config(path, sweep.as_dict(), of.name)
        if not going_on or options.dry_run:  # refuses what does not fit, before any data is read
            described = describe(study, programs, specs, options.device_memory_gib, options.dry_run)
            if options.dry_run:
                say(table_of(described))
                if (path / "config.json").exists():
                    say(f"Nothing was trained. The run in {path} keeps its own plan.json.")
                else:
                    workdir.write_json(path / "plan.json", described)
                    say(f"Nothing was trained. The whole plan is in {path / 'plan.json'}.")
                return None
        sets = {name: data.load(name, options.data_dir) for name in specs}
        if study.estimated:
            study = trial.study(sweep, specs, of.fresh, {name: s.train_labels for name, s in sets.items()})
            programs = plan.programs(study)
        if going_on:
            formulations = _recorded(path, len(programs))
            _check_data(path, sets)
        else:
            described = describe(study, programs, specs, options.device_memory_gib, measure=True)
            formulations = [Formulation(**p["formulation"]) for p in described["programs"]]
            if options.overwrite:
                workdir.clear(path)
            workdir.write_json(path / "plan.json", described)
            workdir.write_json(path / "config.json", _config_file(of, study, sets, options))
        training = Training(of, study, programs, formulations, sets, path, options, say)
        training.run(going_on)
        return load(path)


def _recorded(path: Path, count: int) -> list[Formulation | None]:
    """The formulations that a run began with, which it keeps (contract 1); None: one of an earlier version."""
    try:
        written = [p["formulation"] for p in workdir.read_json(path / "plan.json")["programs"]]
        found = [None if "trial_axis" in form else Formulation(**form) for form in written]
    except (KeyError, TypeError):
        found = []
    if len(found) != count:
        if None in found:  # schedules were programs of their own
            raise InputError(
                f"--workdir={path} holds a run of an earlier version, whose plan had other programs: read it with "
                "plastic_jax.load, or name another folder."
            )
        raise InputError(f"{path / 'plan.json'} is damaged: pass --overwrite to start anew.")
    return found


def _records(program: Any) -> Records:
    """What a checkpoint holds of a finished program: its nodes' records.

    An earlier version wrote the nodes' first and last epochs beside them, where a record now says whether it is a
    node's last.
    """
    if not (program and isinstance(program[0][0], list)):
        return {int(k): v for k, v in program}
    records, reaches = program
    found = {int(k): v for k, v in records}
    for node, own in found.items():
        for record in own:
            record["last"] = record["epoch"] == reaches[node][1]
    return found


def _session(options: Options) -> dict[str, Any]:
    return {
        "command": options.command or shlex.join(sys.argv),
        "versions": versions(),
        "commit": commit(),
        "device": backend.device(),
        "date": datetime.date.today().isoformat(),
    }


def _note_session(path: Path, options: Options) -> None:
    """Write into config.json that the run was gone on with by other versions, commit or device."""
    held = workdir.read_json(path / "config.json")
    now, last = _session(options), ([held] + held.get("resumed", []))[-1]
    if any(now[name] != last.get(name) for name in ("versions", "commit", "device")):
        workdir.write_json(path / "config.json", {**held, "resumed": [*held.get("resumed", []), now]})


def _crc(dataset: data.Dataset) -> int:
    """CRC-32 of a data set's images and labels."""
    total = 0
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return total


def _check_data(path: Path, sets: dict[str, data.Dataset]) -> None:
    """Refuse to go on with other data than the run began with."""
    held = workdir.read_json(path / "config.json").get("datasets", {})
    for name, dataset in sets.items():
        if held.get(name, {}).get("crc32") != _crc(dataset):
            raise InputError(
                f"--workdir={path} holds a run on other data: the files of dataset={name} have changed since it began; "
                "bring the first ones back, or name another folder."
            )


def _config_file(
    of: experiment.Experiment, study: trial.Study, sets: dict[str, data.Dataset], options: Options
) -> dict[str, Any]:
    return {
        "experiment": of.name,
        "config": study.sweep.as_dict(),
        "plugins": [dataclasses.asdict(found) for found in plugins.REGISTERED],
        **_session(options),
        "resumed": [],
        "datasets": {name: {**dataclasses.asdict(s.spec), "crc32": _crc(s)} for name, s in sets.items()},
        "trials": [
            {"trial": t.trial, "arm": t.arm, "seed": t.seed, "config": canonical(t.point)} for t in study.trials
        ],
    }


class Training:
    """The host's loop over programs: checkpoints, progress, tables and the report."""

    def __init__(
        self,
        of: experiment.Experiment,
        study: trial.Study,
        programs: tuple[plan.ProgramPlan, ...],
        formulations: Sequence[Formulation | None],
        sets: dict[str, data.Dataset],
        path: Path,
        options: Options,
        say: Callable[[str], None],
    ):
        self.of, self.study, self.programs, self.formulations = of, study, programs, formulations
        self.sets, self.path, self.options, self.say = sets, path, options, say
        self.done: list[Records] = []  # of finished programs
        self.stop: int | None = None
        self.config = workdir.read_json(path / "config.json")
        self.spent = {"checkpoints and tables": 0.0, "W&B": 0.0, "report": 0.0}  # seconds that training waited for them

    @contextlib.contextmanager
    def _spending(self, on: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.spent[on] += time.monotonic() - begin

    def run(self, going_on: bool) -> None:
        """Train what is not trained yet, then report, and say where the time went; `going_on`: after a run before."""
        began = time.monotonic()
        checkpoints = Checkpoints(self.path / "checkpoints" / "run")
        tracker = self._tracker()
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._catch()
            self._train(checkpoints, tracker, going_on)
        finally:
            for number, handler in before.items():
                _set_signal(number, handler)
            with self._spending("checkpoints and tables"):
                checkpoints.close()
        self._report(tracker)
        whole = time.monotonic() - began
        parts = ", ".join(f"{name} {seconds:.1f} s ({seconds / whole:.1%})" for name, seconds in self.spent.items())
        self.say(f"Time:    {whole:.0f} s; of that {parts}.")

    def _tracker(self) -> tracking.Tracker:
        trials = [tracking.Trial(**t) for t in self.config["trials"]]
        return tracking.Tracker(self.options.wandb, self.path, tracking.PROJECT, self.of.name, trials, self.say)

    def _catch(self) -> None:
        def asked(number: int, _: Any) -> None:
            if self.stop is not None:
                raise KeyboardInterrupt
            self.stop = number

        for number in (signal.SIGINT, signal.SIGTERM):
            _set_signal(number, asked)

    def _train(self, checkpoints: Checkpoints, tracker: tracking.Tracker, going_on: bool) -> None:
        from tqdm import tqdm

        found = checkpoints.restore(self.say)
        arrays: Any = {}
        host: dict[str, Any] = {"done": [], "program": None}
        if found:
            arrays, host = found
        self.done += [_records(program) for program in host["done"]]
        begun = str(self.config.get("commit"))
        if None in self.formulations[len(self.done) :]:
            raise InputError(
                f"--workdir={self.path} holds an unfinished run of an earlier version (commit {begun}), whose states "
                "are laid out otherwise: finish it with that version, or name another folder."
            )
        if going_on:
            _note_session(self.path, self.options)
            self.config = workdir.read_json(self.path / "config.json")
        total = sum(p.shared_steps for p in self.programs)
        passed = sum(p.shared_steps for p in self.programs[: len(self.done)])
        bar = tqdm(
            total=total, initial=passed, unit=" steps", unit_scale=True, desc="training", smoothing=0.05,
            disable=not self.options.progress, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        if found:
            self._write_table()
            self.say(f"Going on from the checkpoint in {checkpoints.directory}.")
        with bar:
            for number in range(len(self.done), len(self.programs)):
                program, formulation = self.programs[number], self.formulations[number]
                assert formulation is not None
                live = ProgramRun(
                    program,
                    self.sets[program.point.dataset],
                    formulation,
                    jax.local_devices(),
                    self.study.sweep.eval_every,
                    self.study.sweep.keep,
                    self.say,
                )
                if host["program"] is not None:
                    live.resume(arrays, host["program"])
                    host["program"] = None
                self._train_program(live, bar, passed, checkpoints, tracker)
                self._keep(live, number)
                self.done.append(live.records)
                passed += program.shared_steps
                self._save(checkpoints, None)
            bar.update(bar.total - bar.n)
        checkpoints.wait()

    def _train_program(
        self, live: ProgramRun, bar: Any, passed: int, checkpoints: Checkpoints, tracker: tracking.Tracker
    ) -> None:
        saved = time.monotonic()
        while live.step():
            released = live.released()
            with self._spending("W&B"):
                tracker.log(
                    list(rows.rows(self.study, live.plan, live.records, released)) if tracker.mode == "online" else []
                )
            bar.update(min(passed + live.steps_done, bar.total) - bar.n)
            due = time.monotonic() - saved > 60 * self.study.sweep.checkpoint_minutes
            if due or self.stop is not None:
                self._save(checkpoints, live)
                saved = time.monotonic()
            if self.stop is not None:
                checkpoints.wait()
                raise Interrupted(signal.Signals(self.stop).name)

    def _save(self, checkpoints: Checkpoints, live: ProgramRun | None) -> None:
        arrays, program = live.snapshot() if live else ({}, None)  # waits for the chunk that is being trained
        host = {"done": [sorted(records.items()) for records in self.done], "program": program}
        with self._spending("checkpoints and tables"):
            checkpoints.save(arrays, host)
            self._write_table(live)

    def _keep(self, live: ProgramRun, number: int) -> None:
        if self.study.sweep.keep != "none":
            live.write_kept(self.path / "checkpoints" / "kept" / str(number))

    def _write_table(self, live: ProgramRun | None = None) -> None:
        found: dict[str, list[Any]] = {name: [] for name in rows.columns(self.study)}
        recorded = list(zip(self.programs, self.done, strict=False))
        if live:
            recorded.append((live.plan, live.records))
        for program, records in recorded:
            for row in rows.rows(self.study, program, records):
                for name, column in found.items():
                    column.append(row.get(name))
        table = pd.DataFrame(
            {n: pd.Series(c, dtype=object if n in self.study.swept else None) for n, c in found.items()}
        )
        measured = [column.name for column in rows.diagnostics(self.study)]
        tables.write(table, self.path / "results.parquet", self.study.swept, measured)

    def _report(self, tracker: tracking.Tracker) -> None:
        begin = time.monotonic()
        table = tables.read(self.path / "results.parquet")
        setting = rows.setting(self.study)
        summary = tables.summary(table, setting)
        workdir.write_json(self.path / "summary.json", summary)
        drawn = [
            figures.save_figure(figure, self.path, name, caption)
            for name, caption, figure in self.of.draw(table, summary, setting, self._subtitle())
        ]
        written = page.page(
            self.path,
            title=self.of.title,
            summary=summary,
            setting=setting,
            figures=drawn,
            config=self.config["config"],
            versions={**self.config["versions"], "commit": self.config["commit"] or "none"},
            device=self.config["device"],
            command=self.config["command"],
            notes=self._notes(),
        )
        self.spent["report"] = time.monotonic() - begin
        with self._spending("W&B"):
            tracker.finish(table, summary)
        self.say("\n" + page.terminal_table(summary, setting))
        self.say("Figures: " + ", ".join(str(f.path) for f in drawn) + f"\nReport:  {written}")

    def _subtitle(self) -> str:
        values = self.study.sweep.values
        one = {n: v[0] if len(v) == 1 else "/".join(map(str, v)) for n, v in values.items()}
        spec = self.sets[values["dataset"][0]].spec
        size = one["train_examples"] or spec.train_examples
        noise = f", label noise {one['label_noise']}" if any(values["label_noise"]) else ""
        net = f"{one['model']} of depth {one['depth']}, width {one['width']}"
        return f"{one['dataset']}, {size} train examples{noise}; {net}"

    def _notes(self) -> list[str]:
        device = self.config["device"]
        resumed = self.config.get("resumed", [])
        more = [f"Gone on with on {s['device']} on {s['date']}, jax {s['versions']['jax']}." for s in resumed]
        return [f"Trained on {device} on {self.config['date']}.", *more]


def _set_signal(number: int, handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's then
        signal.signal(number, handler)
