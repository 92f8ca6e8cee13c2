"""A run from config to report: what an entry point does, and `plastic_jax.run`."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from plastic_jax import backend, data
from plastic_jax.errors import InputError
from plastic_jax.report import wandb_runs
from plastic_jax.running import manifest, workdir
from plastic_jax.running.dry_run import describe, table_of
from plastic_jax.running.experiment import EXPERIMENTS, Experiment
from plastic_jax.running.loading import Run, load
from plastic_jax.running.options import Options
from plastic_jax.running.training import Training
from plastic_jax.study import plan, plugins, trial
from plastic_jax.study.config import FIELDS, Sweep
from plastic_jax.train.trial_axis import Formulation


def default_workdir(name: str, sweep: Sweep) -> Path:
    """runs/NAME-HASH: the same config finds the same folder again, also if fields have been added since."""
    apart = (*manifest.ANALYSIS, *manifest.UNESSENTIAL)
    own = {n: v for n, v in sweep.as_dict().items() if v != FIELDS[n].default and n not in apart}
    return Path("runs") / f"{name}-{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]}"


def run(
    config: Mapping[str, Any],
    workdir: str | os.PathLike[str] | None = None,
    *,
    study: Experiment | str | None = None,
    say: Callable[[str], None] = print,
    plugins: Iterable[str] = (),
    data_dir: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto",
    device_memory_gib: float = 0.0,
    command: str = "",
    progress: bool = True,
) -> Run | None:
    """Train a sweep and report it, as an entry point does.

    Args:
      config: a value or a sequence of values for each field; the others take their defaults.
      workdir: the run's folder; the same call on the same folder continues from where it stopped.
      study: the experiment or its name, by default the warm-start study.
      say: takes each sentence meant for the user.
      plugins: Python files that register methods or models; `plastic_jax.register` does as well.
      data_dir: folder of the data set's original files, or of TFDS.
      dry_run: say and write the plan, train nothing.
      overwrite: start anew in a workdir that holds a run.
      wandb: `auto`, `online`, `offline` or `disabled`.
      device_memory_gib: plan for a device of this memory; 0 for the device at hand.
      command: what config.json says that the run was made by.
      progress: whether a progress bar is drawn.

    Returns:
      The finished run as `plastic_jax.load` gives it; None after a dry run.

    Raises:
      InputError: bad input, before any work has started.
      KeyboardInterrupt: asked to stop; a checkpoint has been written, and the same call continues from it.
    """
    chosen = Options(
        None if workdir is None else os.fspath(workdir),
        data_dir, dry_run, overwrite, wandb, device_memory_gib, command, progress,
    )  # fmt: skip
    try:
        load_plugins(plugins)
        of = EXPERIMENTS.require(study) if isinstance(study, str) else study or Experiment()
        return run_experiment(of, Sweep.of(config), chosen, say)
    except InputError as error:
        raise InputError(re.sub(r"--(config\.)?(?=\w)", "", str(error))) from None  # names, not a shell's flags


load_plugins = plugins.load


def run_experiment(of: Experiment, sweep: Sweep, options: Options, say: Callable[[str], None]) -> Run | None:
    """As `run`, for a sweep that is checked already."""
    backend.prepare()
    if options.wandb not in wandb_runs.MODES:
        raise InputError(f"--wandb={options.wandb!r} is not allowed: one of {', '.join(wandb_runs.MODES)}.")
    specs = {name: data.spec(name, options.data_dir) for name in sweep.values["dataset"]}
    study = trial.study(sweep, specs, of.fresh)
    for sentence in trial.without_effect(study):
        say(sentence)
    path = (Path(options.workdir) if options.workdir else default_workdir(of.name, sweep)).absolute()  # Orbax's wish
    double = "float64" in sweep.values["compute_dtype"]
    with workdir.opened(path), jax.enable_x64(True) if double else contextlib.nullcontext():
        if options.overwrite:
            workdir.check_own(path)
        held = None if options.overwrite else workdir.held(path, sweep, of.name, say)
        if held is None or options.dry_run:  # refuses what does not fit, before any data is read
            described = describe(study, plan.programs(study), specs, options.device_memory_gib, options.dry_run)
            if options.dry_run:
                _say_plan(described, path, say)
                return None
        sets = {name: data.load(name, options.data_dir) for name in specs}
        if study.estimated:
            study = trial.study(sweep, specs, of.fresh, {name: s.train_labels for name, s in sets.items()})
        programs = plan.programs(study)
        if held is None:
            described = describe(study, programs, specs, options.device_memory_gib, measure=True)
            formulations = [Formulation(**p["formulation"]) for p in described["programs"]]
            if options.overwrite:
                workdir.clear(path)
            workdir.write_json(path / "plan.json", described)
            workdir.write_json(path / "config.json", manifest.new(of.name, study, sets, options.command))
        else:
            manifest.check_data(held.config, sets, path)
            formulations = held.formulations
            if held.rebuilt:
                if len(formulations) != len(programs):
                    raise manifest.other_layout(held.config, path)
                described = describe(study, programs, specs, options.device_memory_gib, began_with=formulations)
                _rebuild(held, path, of, study, described)
                say(
                    f"config.json or plan.json in {path} was missing or damaged; it was rebuilt, since the checkpoint "
                    "agrees."
                )
        Training(of, study, programs, formulations, sets, path, options, say).run(held is not None)
        return load(path)


def _say_plan(described: dict[str, Any], path: Path, say: Callable[[str], None]) -> None:
    say(table_of(described))
    if (path / "config.json").exists():
        say(f"Nothing was trained. The run in {path} keeps its own plan.json.")
    else:
        workdir.write_json(path / "plan.json", described)
        say(f"Nothing was trained. The whole plan is in {path / 'plan.json'}.")


def _rebuild(held: workdir.Held, path: Path, of: Experiment, study: trial.Study, described: dict[str, Any]) -> None:
    """Write config.json and plan.json anew, from the command and from what the checkpoint says of them."""
    workdir.write_json(path / "plan.json", described)
    trials = manifest.trials(study)
    workdir.write_json(path / "config.json", {**held.config, "experiment": of.name, "trials": trials})
