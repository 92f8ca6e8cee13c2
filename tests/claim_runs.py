"""Made-up runs of known truth for the claims' tests."""

import numpy as np
import pandas as pd
from synthetic import rows

from plastic_jax.claims import verdicts
from plastic_jax.claims.evidence import Evidence
from plastic_jax.results.settings import Setting
from plastic_jax.study.config import Config, canonical

SEEDS, EPOCHS = 8, 40

# fields of the experiments that are not in every config, with their values on a fresh arm
EXTRA = {
    "multi_stage": {"pretraining_stages": 0, "uniform_fraction": None},
    "module_reset": {"reset": None},
    "online": {"intervention": "reinitialise", "chunk_examples": 5000},
}

WARM = "warm_start_epochs"

LONG = {WARM: 350}


def noise(*key: int) -> np.ndarray:
    """A number a seed, of mean 0 and standard deviation 0.002 to the last bits."""
    draw = np.random.default_rng([7, *key]).normal(size=SEEDS)
    return 0.002 * (draw - draw.mean()) / draw.std(ddof=1)


def made(
    name: str,
    arms: list[tuple[dict, float]],
    *,
    fit: float = 1.0,
    pretraining_fit: float = 0.6,
    epochs: list | None = None,
    seeds: int = SEEDS,
    diverged: int = 0,
    common: dict | None = None,
    fresh: dict | None = None,
    control: float | None = None,
    key: int = 0,
    spread: float = 1.0,
) -> Evidence:
    """A finished run: a fresh arm, and `arms` with their values and true gaps (exact as means over the seeds).

    `spread`: standard deviation of the gaps, in 0.2 points. `epochs`: each arm's epochs to 99 % train accuracy, the
    fresh one's first, a number or one a seed; None: never. `diverged`: seeds of each arm that diverged. `control`: what
    the fresh arm gains until equal updates.
    """
    base = {**canonical(Config()), "warm_start_epochs": 0, **EXTRA.get(name, {}), **(common or {}), **(fresh or {})}
    values = [base] + [{**base, **(common or {}), **own} for own, _ in arms]
    names = [f"arm {k}" for k in range(len(values))]
    table: list[dict] = []
    reached = epochs or [10] * len(values)
    for k, arm in enumerate(names):
        accuracy = 0.8 + noise(99) + ((arms[k - 1][1] + spread * noise(key, k)) if k else 0)
        for seed in range(seeds):
            trial, start = k * seeds + seed, 0
            if k:
                size = 500
                table += rows(trial, {"arm": arm}, seed, "pretraining", [4], [0.5], size=size, fit=pretraining_fit)
                start = 2000
            tuning = rows(
                trial,
                {"arm": arm},
                seed,
                "tuning",
                [*range(1, EPOCHS + 1)],
                [float(accuracy[seed])] * EPOCHS,
                start=start,
                fit=fit,
                diverged=seed < diverged,
            )
            first = reached[k][seed] if isinstance(reached[k], list) else reached[k]
            for row in tuning:
                row["train_accuracy"] = 1.0 if first is not None and row["epoch"] - start / 1000 >= first else 0.9
                row["epoch"] -= start / 1000
            table += tuning
            if not k and control is not None:
                more = [EPOCHS + 1, EPOCHS + 2]
                table += rows(trial, {"arm": arm}, seed, "tuning_continued", more, [accuracy[seed] + control] * 2)
    setting = Setting((), tuple({"arm": arm} for arm in names), dict.fromkeys(names, names[0]), 2, control is not None)
    paper = {n: (value,) for n, value in canonical(Config()).items()}
    paper |= {n: tuple({arm[n] for arm in values}) for own, _ in arms for n in own}
    paper |= {"metric_epochs": (2,), WARM: (0, 350)}
    return Evidence(
        f"runs/{name}-{key}", name, pd.DataFrame(table), setting, dict(zip(names, values, strict=True)), paper
    )


def row_of(claim: str, *found: Evidence) -> dict:
    judged = [row for row in verdicts.judge(found)["rows"] if row["claim"] == claim]
    assert len(judged) == 1
    return judged[0]


OPTIMISERS = [{**LONG, "optimizer": name} for name in ("adam", "rmsprop", "sgd", "momentum")]

SIZES = [{**LONG, "depth": depth, "width": width} for depth in (1, 2) for width in (16, 32)]

RATES = [{**LONG, "tuning_learning_rate_factor": factor} for factor in (1.0, 10.0)]

ONLINE = [{"intervention": "none"}]

SPEED = [{**LONG, "reset": "2-6"}, {**LONG, "reset": "3-6"}]

SPREAD = [19, 20, 21, 20, 19, 20, 21, 20]
