"""The gap at every size of network: the paper's figure 5.

    python -m experiments.capacity                # quickstart: digits, 162 s
    python -m experiments.capacity --preset=paper # ResNets on CIFAR-10, 16 sizes, for accelerators

Depth is d, basic blocks in each of the four modules (ResNet), or hidden layers (MLP); width is w, channels of the
first module, or units of a hidden layer. Each size has its own fresh arm. Expected (paper): a gap at every size.

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures, figures, style
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

QUICKSTART = {
    **warm_start.QUICKSTART,  # the same data and training
    "warm_start_epochs": 200,
    "depth": (2, 4),
    "width": (50, 100, 150),
    "tuning_epochs": 150,  # the smallest network takes longer than 100 to fit its data
    "eval_every": 2,
    "seeds": 10,
}
PAPER = dict(depth=(1, 2, 3, 4), width=(16, 32, 64, 128))  # sizes are ours (the paper does not list its own)


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """Gap and test accuracy against width, a line for each depth."""
    x = style.on_axis(setting, "width", "depth")
    words = {"width": "width w", "depth": "depth d", "warm_start_epochs": "pretraining epochs"}
    gaps = figures.gap_curve(
        table,
        summary,
        setting,
        x=x,
        line="depth" if x == "width" else None,
        title=f"Generalisation gap against the network's size\n{subtitle}",
        xlabel=words[x],
    )
    title = f"Fresh and pretrained networks of several sizes\n{subtitle}"
    accuracy = arm_figures.accuracy_against(table, setting, [arm_figures.Panel(x, words[x])], title)
    return [
        ("gap", "Generalisation gap against width, for each depth (the paper's figure 5).", gaps),
        ("accuracy", "Test accuracy of fresh and pretrained networks against width, for each depth.", accuracy),
    ]


EXPERIMENT = Experiment(
    name="capacity",
    title="Networks of several sizes: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
