"""A larger learning rate for tuning: the paper's figure 7.

    python -m experiments.tuning_learning_rate                # quickstart: digits, 141 s
    python -m experiments.tuning_learning_rate --preset=paper # ResNet-18 on CIFAR-10, 80 trials, for accelerators

The tuning stage's learning rate is 1, 3, 10 or 30 times that of pretraining, in the fresh arm of each rate too. The
control is a schedule that falls from these rates to 0 (cosine) over each stage; fresh networks cannot be trained on
past its end, so there is no control at equal updates. Expected (paper): a rate 10 times larger makes the gap much
smaller, not zero.

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures, figures, style
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

COMMON = dict(tuning_learning_rate_factor=(1.0, 3.0, 10.0, 30.0), schedule=("constant", "cosine"), equal_updates=False)
QUICKSTART = {**warm_start.QUICKSTART, **COMMON, "warm_start_epochs": 200, "eval_every": 2, "seeds": 16}
PAPER = COMMON


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """Gap and test accuracy against the tuning learning rate, a line for each schedule."""
    x = style.on_axis(setting, "tuning_learning_rate_factor")
    label = "pretraining epochs" if x == style.WARM_START else "tuning learning rate / pretraining learning rate"
    gaps = figures.gap_curve(
        table,
        summary,
        setting,
        x=x,
        line="schedule",
        title=f"Generalisation gap against the tuning learning rate\n{subtitle}",
        xlabel=label,
    )
    title = f"Fresh and pretrained networks at several tuning learning rates\n{subtitle}"
    panels = [arm_figures.Panel(x, label)]
    accuracy = arm_figures.accuracy_against(table, setting, panels, title)
    return [
        ("gap", "Generalisation gap against the tuning stage's learning rate (the paper's figure 7).", gaps),
        ("accuracy", "Test accuracy of fresh and pretrained networks against the tuning learning rate.", accuracy),
    ]


EXPERIMENT = Experiment(
    name="tuning_learning_rate",
    title="Tuning learning rate: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
