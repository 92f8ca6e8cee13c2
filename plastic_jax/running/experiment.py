"""What an experiment is: its presets, its fresh arm, its figures. An entry point is one of these and a docstring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pandas as pd

from plastic_jax.registry import Registry
from plastic_jax.report import figures
from plastic_jax.results.settings import Setting
from plastic_jax.study import plugins

Drawing = tuple[str, str, Any]  # name, caption, matplotlib figure
Table: TypeAlias = pd.DataFrame


def warm_start_figures(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """The paper's figures 1 (accuracy curves) and 2, 8-10 (gap against the warm-start length)."""
    curves = figures.accuracy_curves(table, setting, f"Fresh against pretrained\n{subtitle}")
    gaps = figures.gap_curve(table, summary, setting, title=f"Generalisation gap against warm-start length\n{subtitle}")
    return [
        ("accuracy_curves", "Test and train accuracy, fresh and longest warm start (the paper's figure 1).", curves),
        ("gap", "Generalisation gap against the number of pretraining epochs (the paper's figures 2, 8-10).", gaps),
    ]


@dataclass(frozen=True)
class Experiment:
    """A named study. `fresh` turns a point of the sweep into its fresh arm; `presets` name field values."""

    name: str = "warm_start"
    title: str = "Warm start: the generalisation gap"
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fresh: Mapping[str, Any] = field(default_factory=lambda: {"warm_start_epochs": 0})
    draw: Callable[[Table, list[dict[str, Any]], Setting, str], list[Drawing]] = warm_start_figures

    def __repr__(self) -> str:
        return f"Experiment({self.name!r})"


EXPERIMENTS: Registry[Experiment] = Registry(
    "experiment",
    ("experiments", "plastic_jax.experiments"),  # in a checkout, and where it is installed
    (
        "warm_start",
        "smooth_transition",
        "multi_stage",
        "capacity",
        "module_reset",
        "tuning_learning_rate",
        "online",
    ),
    called="EXPERIMENT",
)
plugins.kind(Experiment, EXPERIMENTS)
