"""The smooth transition: the paper's figure 3.

    python -m experiments.smooth_transition                # quickstart: digits, 118 s
    python -m experiments.smooth_transition --preset=paper # ResNet-18 on CIFAR-10, for accelerators

One stage of N steps. At step n each example is drawn, with replacement, from the whole train set with probability
p(n) = 1 - gamma^(50 n / N), else from the pretraining subset. The fresh arm is the same sampler with gamma = 0, so
that p = 1; an ordinary fresh arm, which sees every example once an epoch, stands beside it. Expected (paper): a gap for
every gamma.

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures, figures
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

COMMON = dict(transition=("abrupt", "smooth"), warm_start_epochs=0, equal_updates=False)
QUICKSTART = {
    **warm_start.QUICKSTART,  # the same data and network
    **COMMON,
    "gamma": (0.1, 0.5, 0.9),
    "tuning_epochs": 300,
    "metric_epochs": 50,
    "eval_every": 2,
    "seeds": 16,
}
PAPER = dict(COMMON, gamma=(0.1, 0.3, 0.5, 0.7, 0.9))


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """Gap and test accuracy against gamma."""
    label = "gamma: the larger, the longer the subset prevails"
    gaps = figures.gap_curve(
        table,
        summary,
        setting,
        x="gamma",
        line=None,
        title=f"Generalisation gap of a smooth transition\n{subtitle}",
        xlabel=label,
    )
    title = f"Test accuracy of a smooth transition\n{subtitle}"
    line, beside = "smooth transition (gamma = 0: fresh)", "ordinary fresh, each example once an epoch"
    panels = [arm_figures.Panel("gamma", f"{label} (0: fresh)", line=line, beside=beside)]
    accuracy = arm_figures.accuracy_against(table, setting, panels, title)
    return [
        ("gap", "Generalisation gap against gamma, to the same sampler with gamma = 0 (the paper's figure 3).", gaps),
        ("accuracy", "Test accuracy against gamma (0: fresh), and of an ordinary fresh network beside it.", accuracy),
    ]


EXPERIMENT = Experiment(
    name="smooth_transition",
    title="Smooth transition: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    fresh={"gamma": 0.0},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
