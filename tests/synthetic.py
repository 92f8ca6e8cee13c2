"""Made-up results tables for the tests of the statistics and the report."""

from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.results.settings import Setting

TRAIN_EXAMPLES, BATCH = 1000, 100


def rows(
    trial: int,
    arm: dict[str, Any],
    seed: int,
    stage: str,
    epochs: list[int],
    test: list[float],
    *,
    size: int = TRAIN_EXAMPLES,
    start: int = 0,
    fit: float | None = 1.0,
    diverged: bool = False,
    train: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows of one stage, evaluated after `epochs` of `size` examples with test accuracies `test`.

    `start`: examples seen before the stage. `fit` stands in the last row. `diverged`: the last
    evaluation is the marked row of a diverged trial.
    """
    made: list[dict[str, Any]] = []
    for epoch, accuracy in zip(epochs, test, strict=True):
        seen = start + epoch * size
        made.append(
            {"trial": trial, "seed": seed, **arm, "stage": stage, "epoch": float(epoch)}
            | {"step": seen // BATCH, "examples_seen": seen}
            | {"train_accuracy": train, "train_loss": 0.01, "test_accuracy": accuracy}
            | {"test_loss": 1.0, "fit_accuracy": None, "diverged": False}
        )
    if diverged:
        metrics = ("train_accuracy", "train_loss", "test_accuracy", "test_loss")
        made[-1] |= dict.fromkeys(metrics) | {"diverged": True}
    else:
        made[-1]["fit_accuracy"] = fit
    return made


def two_arms(metric_epochs: int = 2, *, equal_updates: bool = False) -> Setting:
    """A fresh arm, 'fresh', and one pretrained for 4 epochs, 'warm'."""
    arms = ({"arm": "fresh", "warm_start_epochs": 0}, {"arm": "warm", "warm_start_epochs": 4})
    fresh = {"fresh": "fresh", "warm": "fresh"}
    return Setting(("warm_start_epochs",), arms, fresh, metric_epochs, equal_updates)


def pair_table(fresh: list[float], warm: list[float], *, fit: tuple[float, float] = (1.0, 1.0)) -> pd.DataFrame:
    """`two_arms`, a trial a seed and arm, whose metrics are `fresh` and `warm`."""
    setting = two_arms()
    made = []
    for index, (arm, values) in enumerate(zip(setting.arms, (fresh, warm), strict=True)):
        for seed, value in enumerate(values):
            if index:
                half = TRAIN_EXAMPLES // 2
                made += rows(2 * seed + 1, arm, seed, "pretraining", [2, 4], [0.3, 0.5], size=half)
            made += rows(
                2 * seed + index,
                arm,
                seed,
                "tuning",
                [1, 2, 3],
                [0.0, value - 0.01, value + 0.01],
                start=index * 4 * TRAIN_EXAMPLES // 2,
                fit=fit[index],
            )
    return pd.DataFrame(made)


def learning_curves(
    lengths: tuple[int, ...],
    optimizers: tuple[str, ...],
    seeds: int,
    *,
    tuning_epochs: int,
    metric_epochs: int,
) -> tuple[pd.DataFrame, Setting]:
    """A whole sweep that looks like the paper's: saturating curves, a gap that grows with length.

    With an equal-updates control; SGD at its longest length does not fit.
    """
    arms: tuple[dict[str, Any], ...] = tuple(
        {"arm": f"optimizer={o}, warm_start_epochs={n}", "optimizer": o, "warm_start_epochs": n}
        for o in optimizers
        for n in lengths
    )
    fresh = {arm["arm"]: f"optimizer={arm['optimizer']}, warm_start_epochs=0" for arm in arms}
    random = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    trial = 0
    top = {name: 0.78 - 0.06 * index for index, name in enumerate(optimizers)}
    base = random.normal(0, 0.004, seeds)

    def course(epochs: np.ndarray, end: float, speed: float) -> list[float]:
        noise = random.normal(0, 0.003, len(epochs))
        return list(end * (1 - np.exp(-(epochs + 0.5) / speed)) ** 0.5 + noise)

    for arm in arms:
        length = arm["warm_start_epochs"]
        unfitted = arm["optimizer"] == "sgd" and length == max(lengths)
        for seed in range(seeds):
            end = top[arm["optimizer"]] + base[seed]
            gap = 0.013 * np.log1p(length) / np.log1p(max(lengths)) + random.normal(0, 0.003)
            if length:
                epochs = np.arange(1, length + 1)
                accuracy = course(epochs, end - 0.08, length / 10 + 1)
                half = TRAIN_EXAMPLES // 2
                made += rows(trial, arm, seed, "pretraining", list(epochs), accuracy, size=half)
            start = length * TRAIN_EXAMPLES // 2
            epochs = np.arange(1, tuning_epochs + 1)
            accuracy = course(epochs, end - gap * bool(length), tuning_epochs / 15)
            fit = 0.96 if unfitted else 1.0
            made += rows(trial, arm, seed, "tuning", list(epochs), accuracy, start=start, fit=fit)
            if not length:
                beyond = np.arange(tuning_epochs + 1, tuning_epochs + max(lengths) // 2 + 1)
                accuracy = list(end + 0.001 + random.normal(0, 0.002, len(beyond)))
                made += rows(trial, arm, seed, "tuning_continued", list(beyond), accuracy)
            trial += 1
    table = pd.DataFrame(made)
    tuned = table["stage"] != "tuning_continued"
    table.loc[tuned, "train_accuracy"] = np.clip(
        1 - 0.6 * np.exp(-table.loc[tuned, "epoch"] / (tuning_epochs / 12)), 0, 1
    )
    swept = ("optimizer", "warm_start_epochs")
    return table, Setting(swept, arms, fresh, metric_epochs, True)
