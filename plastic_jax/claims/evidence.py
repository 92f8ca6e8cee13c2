"""A finished workdir as the claims use it: its arms with all their values, their pairs, and the paper's own values."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.results import pairing, rows, summaries
from plastic_jax.results.settings import TUNING, Setting
from plastic_jax.running import loading, manifest
from plastic_jax.running.experiment import EXPERIMENTS, Experiment
from plastic_jax.study import trial
from plastic_jax.study.config import FIELDS, Sweep, canonical


@dataclass(frozen=True)
class Evidence:
    """A finished run. `values`: each arm's value of every swept-kind field, None where it has no effect.

    `paper`: the values that each field has in the experiment's preset `paper`. `table` as in results.parquet.
    """

    workdir: str
    experiment: str
    table: pd.DataFrame
    setting: Setting
    values: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, tuple[Any, ...]]

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """`results.trial_metrics`, one row per trial."""
        return pairing.trial_metrics(self.table, self.setting)

    @cached_property
    def summary(self) -> dict[str, dict[str, Any]]:
        """`results.summary`, by the arm's name."""
        return {row["arm"]: row for row in summaries.summary(self.table, self.setting)}

    def pairs(self, arm: str) -> pd.DataFrame:
        """`results.pairs` of an arm: columns arm, fresh, control; a row per seed of which both halves are sound."""
        return pairing.pairs(self.table, self.setting, self.metrics, arm)

    def fits(self, arm: str, stage: str = TUNING) -> pd.Series:
        """By seed: the accuracy on a stage's own train set at that stage's end, a fraction."""
        stages = self.table[(self.table["arm"] == arm) & (self.table["stage"] == stage)]
        return stages.sort_values("step").groupby("seed")["fit_accuracy"].last()

    def epochs_to(self, arm: str, accuracy: float) -> pd.DataFrame:
        """By seed: bounds `low` and `high` of the first epoch of tuning whose train accuracy is at least `accuracy`.

        They are equal where every epoch is evaluated; `high` is infinite where that accuracy was never seen.
        """
        found = pairing.epochs_to_accuracy(self.table[self.table["arm"] == arm], accuracy).set_index("seed")
        return pd.DataFrame({"low": found["before"] + 1, "high": found["epochs"].where(found["reached"], np.inf)})


def read(path: str | os.PathLike[str]) -> Evidence:
    """Read a finished workdir.

    Raises:
      InputError: it is no workdir, of an unknown experiment, not finished, or its files contradict each other.
    """
    run = loading.load(path)
    if not run.finished:
        raise InputError(
            f"{run.path} is not a finished run: it has no summary.json of its last analysis; run its command again."
        )
    try:
        name, config = run.config["experiment"], run.config["config"]
        specs = {
            each: DatasetSpec(**{f.name: _tuple(spec[f.name]) for f in dataclasses.fields(DatasetSpec)})
            for each, spec in run.config["datasets"].items()
        }
        named = {(t["arm"], t["seed"]) for t in run.config["trials"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.path / 'config.json'} is not of this version: it lacks {error}.") from None
    if name not in EXPERIMENTS:
        raise InputError(f"{run.path} is of an unknown experiment, {name!r}: there is no experiments.{name}.")
    experiment = EXPERIMENTS[name]
    try:
        study = trial.study(Sweep.of(manifest.translated(config)), specs, experiment.fresh)
    except (InputError, KeyError) as error:
        raise InputError(f"{run.path / 'config.json'} is not of this version: {error}") from None
    found = Evidence(
        workdir=str(path),
        experiment=experiment.name,
        table=run.table,
        setting=rows.setting(study),
        values={arm.arm: canonical(arm.point) for arm in study.arms},
        paper=paper_values(experiment),
    )
    _check(found, {(t.arm, t.seed) for t in study.trials}, named, run)
    return found


def paper_values(experiment: Experiment) -> dict[str, tuple[Any, ...]]:
    """Each field's values in an experiment's preset `paper`; the defaults are the paper's common setting."""
    preset = experiment.presets.get("paper", {})
    given = {name: preset.get(name, spec.default) for name, spec in FIELDS.items()}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(found: Evidence, wanted: set[tuple[str, int]], named: set[tuple[str, int]], run: loading.Run) -> None:
    """The config's trials are all there and finished, and summary.json says what the table says."""
    if wanted != named:
        raise InputError(f"{run.path / 'config.json'} is not of this version: it has other trials.")
    ended = found.metrics[found.metrics["finished"]]
    if missing := len(wanted) - len(wanted & set(zip(ended["arm"], ended["seed"], strict=True))):
        raise InputError(
            f"{run.path} is not a finished run: {missing} of its {len(wanted)} trials have not ended; run its "
            "command again to finish it."
        )
    try:
        same = all(
            row["pairs"] == found.summary[row["arm"]]["pairs"] and _close(row["gap"], found.summary[row["arm"]]["gap"])
            for row in run.summary
        ) and len(run.summary) == len(found.summary)
    except (KeyError, TypeError):
        same = False
    if not same:
        raise InputError(
            f"{run.path / 'summary.json'} does not agree with results.parquet: run the command of the run "
            "again to write it anew."
        )


def _close(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) < 1e-9
