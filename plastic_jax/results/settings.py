"""What the statistics need to know about a study, and the words of its table."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.fields import Column

TUNING, CONTINUED = "tuning", "tuning_continued"


FITTED = 0.99  # mean fit_accuracy from which a network counts as fitting its data


MOST_DIVERGED = 0.1  # share of diverged trials above which an arm gets no verdict


LEAST_PAIRS_T, LEAST_PAIRS_BOOTSTRAP = 3, 20


EPSILON = 1e-9  # a sum or a ratio is rounded: no comparison of epochs or means is closer


@dataclass(frozen=True)
class Setting:
    """What the statistics need to know about the config.

    `swept`: names of the swept fields. `arms`: in the order of the report, each with `arm` (its
    name) and every swept field's value, None where the field has no effect on the arm. `fresh`: an
    arm's name -> the name of the arm to compare it with; a fresh arm maps to itself.
    `metric_epochs`: an accuracy is the mean over this many last epochs of the tuning stage.
    `equal_updates`: whether fresh trials were trained on, as a control for training time.
    `eval_every`: epochs between a trial's own evaluations. `diagnostics`: what was measured beside accuracy and loss.
    """

    swept: tuple[str, ...]
    arms: tuple[dict[str, Any], ...]
    fresh: dict[str, str]
    metric_epochs: int
    equal_updates: bool
    eval_every: int = 1
    diagnostics: tuple[Column, ...] = ()

    def is_fresh(self, arm: str) -> bool:
        """Whether the arm is one that others are compared with."""
        return self.fresh[arm] == arm


def plain(value: Any) -> Any:
    """A value as JSON knows it: no numpy scalar, null for NaN and infinities."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value
