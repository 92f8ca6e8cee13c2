"""Which W&B runs a study has, and the rows of each."""

import hashlib
import json
import math
import numbers
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.results import settings

Rows = list[tuple[int, dict[str, Any]]]
"""A portion of a W&B history: (step, column -> value), steps strictly increasing."""
MODES = ("auto", "online", "offline", "disabled")


MOST_TRIALS = 256  # above it, a W&B run is an arm


PROJECT = "plastic_jax"  # where none is named


LONGEST_NAME = 128  # that W&B takes


AXES = ("stage", "epoch", "step", "examples_seen")


_IDENTITY = frozenset({"trial", "arm", "seed"})  # a run's name, group and config say these


@dataclass(frozen=True)
class Trial:
    """What W&B gets about a trial: its number in the results table and its own config (flat)."""

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


class Histories:
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
            if axes.get("stage") == settings.CONTINUED:
                values = {f"{settings.CONTINUED}/{name}": value for name, value in values.items()}
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
class Content:
    """All that W&B stores of a run; `summary` is added to the last values."""

    run: Run
    rows: Rows
    summary: dict[str, Any]
    digest: str


def contents_of(
    project: str, runs: Iterable[Run], table: pd.DataFrame, summary: Iterable[dict[str, Any]]
) -> Iterator[Content]:
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
        history = Histories([run]).take(rows)[run.id]
        added = _arm_summary(run, arms.get(run.trials[0].arm, {}))
        said = [project, run.name, run.group, run.job_type, run.config, history, added]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        yield Content(run, history, added, digest)


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
