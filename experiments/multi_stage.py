"""Several pretraining stages, and imbalanced ones: the paper's figure 4.

    python -m experiments.multi_stage                # quickstart: digits, 163 s
    python -m experiments.multi_stage --preset=paper # ResNet-18 on CIFAR-10, 105 trials, for accelerators
    python -m experiments.multi_stage --preset=paper --config.uniform_fraction=1            # figure 4, left, alone
    python -m experiments.multi_stage --preset=paper --config.pretraining_stages='(0, 2)'   # right, with n = 2 alone

n stages come before tuning, on nested subsets D_1 .. D_n of the train set, each until 100 % train accuracy. A share r
of the examples is dealt to the stages at random, the others come class by class. Expected (paper): test accuracy falls
monotonically with n (left); the smaller r, the larger the gap (right). Tuning keeps its full budget.

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures, figures
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

N, R = "number of pretraining stages n", "r (uniform_fraction): share dealt at random, the rest class by class"
COMMON = dict(stage_accuracy=1.0, accuracy_ends="pretraining")
QUICKSTART = {
    **warm_start.QUICKSTART,  # the same data and network
    **COMMON,
    "warm_start_epochs": 300,  # the cap of a stage
    "pretraining_stages": (0, 1, 2, 4),
    "uniform_fraction": (1.0, 0.5, 0.0),
    "seeds": 24,
}
# The values of n and r and the cap of 350 epochs a stage are ours.
PAPER = dict(COMMON, pretraining_stages=(0, 1, 2, 4, 9), uniform_fraction=(1.0, 0.75, 0.5, 0.25, 0.0))


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """Test accuracy against n and against r; the gap against n."""
    shares = [arm["uniform_fraction"] for arm in setting.arms if arm.get("uniform_fraction") is not None]
    panels = [arm_figures.Panel("pretraining_stages", N, {"uniform_fraction": max(shares)} if shares else {})]
    if shares:
        panels.append(arm_figures.Panel("uniform_fraction", R))
    title = f"Test accuracy after several pretraining stages\n{subtitle}"
    accuracy = arm_figures.accuracy_against(table, setting, panels, title)
    gaps = figures.gap_curve(
        table,
        summary,
        setting,
        x="pretraining_stages",
        line="uniform_fraction",
        title=f"Generalisation gap against the number of stages\n{subtitle}",
        xlabel=N,
    )
    return [
        ("stages", "Test accuracy against the number of stages n, and against r (the paper's figure 4).", accuracy),
        ("gap", "Generalisation gap against the number of pretraining stages.", gaps),
    ]


EXPERIMENT = Experiment(
    name="multi_stage",
    title="Several pretraining stages: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    fresh={"pretraining_stages": 0},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
