"""The host's loop over a run's programs: checkpoints, progress, tables, and the report at the end."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from plastic_jax.data import Dataset
from plastic_jax.errors import InputError
from plastic_jax.report import page, style, wandb_runs
from plastic_jax.report.tracker import Tracker
from plastic_jax.results import rows, summaries, tables
from plastic_jax.running import manifest, workdir
from plastic_jax.running.checkpoint import Checkpoints
from plastic_jax.running.experiment import Experiment
from plastic_jax.running.options import Options
from plastic_jax.study.plan import ProgramPlan
from plastic_jax.study.trial import Study
from plastic_jax.train.program import ProgramRun
from plastic_jax.train.schedule import Records
from plastic_jax.train.trial_axis import Formulation


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop; everything computed is in a checkpoint, as its message says."""


class Training:
    """The host's loop over programs: checkpoints, progress, tables and the report."""

    def __init__(
        self,
        of: Experiment,
        study: Study,
        programs: tuple[ProgramPlan, ...],
        formulations: Sequence[Formulation | None],
        sets: dict[str, Dataset],
        path: Path,
        options: Options,
        say: Callable[[str], None],
    ):
        self.of, self.study, self.programs, self.formulations = of, study, programs, formulations
        self.sets, self.path, self.options, self.say = sets, path, options, say
        self.fingerprints = [program.fingerprint for program in programs]
        self.done: list[Records] = []  # of finished programs
        self.stop: int | None = None
        self.changed = ""  # what is said where the code has changed since
        self.config = workdir.read_json(path / "config.json")
        self.spent = {"checkpoints and tables": 0.0, "W&B": 0.0, "report": 0.0}  # seconds that training waited for them

    @contextlib.contextmanager
    def _spending(self, on: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.spent[on] += time.monotonic() - begin

    def run(self, going_on: bool) -> None:
        """Train what is not trained yet, then report, and say where the time went.

        `going_on`: whether this continues an earlier run.
        """
        began = time.monotonic()
        numbers = [t.trial for t in self.study.trials]
        if going_on and workdir.trained(self.path, numbers):
            self._go_on(training=False)
            self._report(self._tracker())
        else:
            self._train_and_report(going_on)
        whole = time.monotonic() - began
        parts = ", ".join(f"{name} {seconds:.1f} s ({seconds / whole:.1%})" for name, seconds in self.spent.items())
        self.say(f"Time:    {whole:.0f} s; of that {parts}.")

    def _train_and_report(self, going_on: bool) -> None:
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

    def _go_on(self, training: bool) -> None:
        """Say and write down what the run is continued or analysed by; `training`: whether something is left to do."""
        session = manifest.session(self.options.command, manifest.used(self.study, self.of.name))
        self.changed = manifest.changed_code(self.config, session, finished=not training)
        now = manifest.resumed(self.config, session, self.study.sweep, training)
        if now != self.config:
            self.config = now
            workdir.write_json(self.path / "config.json", now)
        if self.changed:
            self.say(self.changed)

    def _tracker(self) -> Tracker:
        trials = [wandb_runs.Trial(**t) for t in self.config["trials"]]
        return Tracker(self.options.wandb, self.path, wandb_runs.PROJECT, self.of.name, trials, self.say)

    def _catch(self) -> None:
        def asked(number: int, _: Any) -> None:
            if self.stop is not None:
                raise KeyboardInterrupt
            self.stop = number

        for number in (signal.SIGINT, signal.SIGTERM):
            _set_signal(number, asked)

    def _train(self, checkpoints: Checkpoints, tracker: Tracker, going_on: bool) -> None:
        from tqdm import tqdm

        found = checkpoints.restore(self.say)
        arrays: Any = {}
        host: dict[str, Any] = {"done": [], "program": None}
        if found:
            arrays, host = found
        elif going_on and (self.path / "summary.json").exists():
            raise InputError(
                f"--workdir={self.path} holds a finished run whose results.parquet is damaged or missing, and no "
                "checkpoint that has its content: restore one of them, or name another folder."
            )
        self.done += [_records(program) for program in host["done"]]
        begun = None  # the program that was being trained
        if going_on:
            self._check_plan(host)
            if host["program"] is not None:
                begun = self._live(len(self.done))
                if not begun.fits(arrays, host["program"]):
                    raise manifest.other_layout(self.config, self.path)
                begun.resume(arrays, host["program"])
            self._go_on(training=len(self.done) < len(self.programs))
        if found:
            self._write_table(begun)
            self.say(f"Continuing from the checkpoint in {checkpoints.directory}.")
        elif going_on:
            self.say(f"There is no checkpoint in {checkpoints.directory}: training starts at the beginning.")
        total = sum(p.shared_steps for p in self.programs)
        passed = sum(p.shared_steps for p in self.programs[: len(self.done)])
        bar = tqdm(
            total=total, initial=passed, unit=" steps", unit_scale=True, desc="training", smoothing=0.05,
            disable=not self.options.progress, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        with bar:
            for number in range(len(self.done), len(self.programs)):
                live, begun = begun or self._live(number), None
                self._train_program(live, bar, passed, checkpoints, tracker)
                self._keep(live, number)
                self.done.append(live.records)
                passed += self.programs[number].shared_steps
                self._save(checkpoints, None)
            bar.update(bar.total - bar.n)
        checkpoints.wait()

    def _live(self, number: int) -> ProgramRun:
        program, formulation = self.programs[number], self.formulations[number]
        assert formulation is not None
        return ProgramRun(
            program,
            self.sets[program.point.dataset],
            formulation,
            jax.local_devices(),
            self.study.sweep.eval_every,
            self.study.sweep.keep,
            self.say,
        )

    def _check_plan(self, host: dict[str, Any]) -> None:
        """Refuse to continue a run whose plan had other nodes, or whose states were laid out differently."""
        nodes = host.get("manifest", {}).get("nodes")
        other = len(self.formulations) != len(self.programs) or None in self.formulations[len(self.done) :]
        if other or nodes not in (None, self.fingerprints):
            raise manifest.other_layout(self.config, self.path)

    def _train_program(
        self, live: ProgramRun, bar: Any, passed: int, checkpoints: Checkpoints, tracker: Tracker
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
                name = signal.Signals(self.stop).name
                raise Interrupted(
                    f"Interrupted by {name}: a checkpoint was written, and the same command continues from it."
                )

    def _save(self, checkpoints: Checkpoints, live: ProgramRun | None) -> None:
        arrays, program = live.snapshot() if live else ({}, None)  # waits for the chunk that is being trained
        made = {name: value for name, value in self.config.items() if name != "trials"}
        forms = [dataclasses.asdict(form) for form in self.formulations if form is not None]
        host = {
            "done": [sorted(records.items()) for records in self.done],
            "program": program,
            "manifest": {"config": made, "formulations": forms, "nodes": self.fingerprints},
        }
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

    def _report(self, tracker: Tracker) -> None:
        begin = time.monotonic()
        final = manifest.analysed(self.config)
        table = tables.read(self.path / "results.parquet")
        setting = rows.setting(self.study)
        summary = summaries.summary(table, setting)
        workdir.write_json(self.path / "summary.json", summary)
        drawn = [
            style.save_figure(figure, self.path, name, caption)
            for name, caption, figure in self.of.draw(table, summary, setting, self._subtitle())
        ]
        written = page.page(
            self.path,
            title=self.of.title,
            summary=summary,
            setting=setting,
            figures=drawn,
            config=self.config["config"],
            versions={**self.config["versions"], "commit": self.config.get("commit") or "none"},
            device=self.config["device"],
            command=self.config["command"],
            notes=self._notes(),
        )
        if final != self.config:
            self.config = final
            workdir.write_json(self.path / "config.json", final)
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
        more = [
            f"Resumed on {s['device']} on {s['date']}, jax {s['versions']['jax']}, {manifest.made_by(s)}."
            for s in resumed
        ]
        if again := self.config.get("analysed"):
            values = ", ".join(f"{name}={again[name]}" for name in manifest.ANALYSIS)
            by = f", {manifest.made_by(again)}" if "versions" in again else ""
            more.append(f"Analysed again on {again['date']} with {values}{by}.")
        return [f"Trained on {device} on {self.config['date']}.", *more, *filter(None, [self.changed])]


def _set_signal(number: int, handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's then
        signal.signal(number, handler)


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
