"""Workdirs of finished or running studies, read back: the table, the summary and the kept models."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from plastic_jax import models
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.results import tables
from plastic_jax.running import manifest, workdir
from plastic_jax.study.config import FIELDS, Config


@dataclass(frozen=True)
class Kept:
    """A trial's model at a stage's end: `model` is its network, the rest its trees of arrays."""

    model: models.Network
    params: Any
    batch_stats: Any
    point: Config

    def __repr__(self) -> str:
        return f"Kept({self.point.model}, width {self.point.width}, depth {self.point.depth})"

    def logits(self, images: np.ndarray) -> jax.Array:
        """Logits [n, classes] of uint8 images [n, H, W, C], with running statistics."""
        return self.model.logits(self.params, self.batch_stats, jnp.asarray(images))


@dataclass(frozen=True)
class Run:
    """A workdir. `table` is results.parquet, `summary` summary.json, `config` config.json."""

    path: Path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}{'' if self.finished else ', unfinished'})"

    @property
    def finished(self) -> bool:
        """Whether the run has ended and was analysed; the same command continues one that has not."""
        return workdir.ended(self.path, self.config)

    def _unfinished(self, what: str) -> InputError:
        return InputError(
            f"{self.path} holds an unfinished run, which has no {what} yet: `{self.config.get('command')}` continues "
            "it; `.table` has its rows so far."
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per trial, stage and evaluation."""
        return tables.read(self.path / "results.parquet")

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """One flat dict per arm.

        Raises:
          InputError: the run is unfinished.
        """
        if not self.finished:
            raise self._unfinished("summary")
        return workdir.read_json(self.path / "summary.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config, command, versions, commit, device and trials.

        Raises:
          InputError: config.json is missing, damaged, or of a newer version.
        """
        held = workdir.read_config(self.path)
        if held is None:
            kept = workdir.of_checkpoint(self.path, lambda _: None)
            command = f"`{kept['config']['command']}`" if kept else "the command that made it, run again,"
            hint = "rebuilds it from the checkpoint" if kept else "rebuilds it where there is a checkpoint"
            raise InputError(f"{self.path / 'config.json'} is missing, damaged or unreadable: {command} {hint}.")
        return held

    @cached_property
    def kept(self) -> dict[tuple[int, str], tuple[str, int]]:
        """Which models there are: (trial, stage) -> (folder, position in it)."""
        found = {}
        for index in sorted((self.path / "checkpoints" / "kept").glob("*/index.json")):
            for k, names in enumerate(_models(index)[0]):
                found |= {of: (str(index.parent), k) for of in names}
        return found

    def model(self, trial: int, stage: str = "tuning") -> Kept:
        """The model of a trial at the end of a stage; needs `--config.keep=ends` or `stages`.

        Raises:
          InputError: it was not kept.
        """
        if (trial, stage) not in self.kept and not self.finished:
            raise self._unfinished("kept models")
        if (trial, stage) not in self.kept:
            raise InputError(
                f"trial={trial}, stage={stage!r} was not kept in {self.path}: kept are "
                f"{sorted(self.kept) or 'none (train with --config.keep=ends or stages)'}."
            )
        from orbax.checkpoint import v1 as ocp

        folder, k = self.kept[trial, stage]
        stacks = ocp.load(Path(folder) / "models")
        own = next(t["config"] for t in self.config["trials"] if t["trial"] == trial)
        one = {n: v for n, v in manifest.translated(self.config["config"]).items() if not isinstance(v, list)}
        values = one | {name: value for name, value in manifest.translated(own).items() if value is not None}
        point = Config(**{name: value for name, value in values.items() if name in FIELDS})
        if point.model not in models.MODELS:
            raise InputError(
                f"model={point.model} of {self.path} is a plug-in's: register it with plastic_jax.register first."
            )
        spec = self.config["datasets"][point.dataset]
        network = models.network(point, tuple(spec["shape"]), spec["classes"], Form("mapped"))
        leaves = [np.asarray(stacks[name][k]) for name in sorted(stacks)]
        if not _models(Path(folder) / "index.json")[1]:
            leaves = [leaf.transpose(3, 0, 1, 2) if leaf.ndim == 4 else leaf for leaf in leaves]
        tree = jax.tree.unflatten(jax.tree.structure(network.shapes()), [jnp.asarray(leaf) for leaf in leaves])
        return Kept(network, tree["params"], tree["batch_stats"], point)


def _models(index: Path) -> tuple[list[list[tuple[int, str]]], bool]:
    """Of a file index.json: each kept model's trials and stages; whether kernels are [O, h, w, I], not [h, w, I, O].

    An earlier version kept the latter.
    """
    try:
        held = json.loads(index.read_text())
        listed = held["models"] if isinstance(held, dict) else held
        return [[(int(trial), str(stage)) for trial, stage in names] for names in listed], isinstance(held, dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index} is damaged or unreadable ({type(error).__name__}): it says which models are beside it. "
            "Restore it to read them; the table and the summary do not need it."
        ) from None


def load(path: str | os.PathLike[str]) -> Run:
    """Open a workdir.

    Raises:
      InputError: it is no workdir, or one whose config.json is damaged or of a newer version.
    """
    found = Run(Path(path).absolute())
    if not any((found.path / name).exists() for name in ("config.json", "checkpoints", "results.parquet")):
        raise InputError(f"{found.path} is no workdir of a run: it has no config.json.")
    _ = found.config  # refuses what cannot be read
    return found
