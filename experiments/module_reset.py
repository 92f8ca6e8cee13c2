"""Which modules are re-initialised after pretraining: the paper's figures 6 and 11.

    python -m experiments.module_reset                # quickstart: digits, 127 s
    python -m experiments.module_reset --preset=paper # ResNet-18 on CIFAR-10, 85 trials, for accelerators

Every prefix, suffix and singleton of the six modules: 1 is a ResNet's stem, 2-5 its modules of blocks, 6 its head; of
an MLP they are the linear layers, six at depth 5. A module's norm is reset with it. Expected (paper): resetting the
last 4 or 5 modules recovers the fresh accuracy; small subsets, the head alone included, do not (figure 6); with the
first modules kept, training to 99 % train accuracy is no faster than a fresh network's (figure 11).

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

PREFIXES = ("1", "1-2", "1-3", "1-4", "1-5", "1-6")
SUFFIXES = ("6", "5-6", "4-6", "3-6", "2-6", "1-6")
SINGLETONS = ("1", "2", "3", "4", "5", "6")
RESETS = ("none", *dict.fromkeys(PREFIXES + SUFFIXES + SINGLETONS))
QUICKSTART = {
    **warm_start.QUICKSTART,  # the same data and training
    "depth": 5,
    "warm_start_epochs": 200,
    "reset": RESETS,
    "seeds": 16,
}
PAPER = dict(reset=RESETS)


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """The gap of each reset; epochs to 99 % train accuracy with the first modules kept. Both for each other setting."""
    groups = {"first modules reset": PREFIXES, "last modules reset": SUFFIXES, "one module reset": SINGLETONS}
    found: list[Drawing] = []
    for k, (words, part) in enumerate(arm_figures.apart(setting, "reset"), 1):
        below, after, number = subtitle + f", {words}" * bool(words), f": {words}" * bool(words), f"_{k}" * (k > 1)
        title = f"Generalisation gap after a reset of modules\n{below}"
        gaps = arm_figures.reset_gaps(table, summary, part, groups, title)
        caption = f"Generalisation gap against the modules that were re-initialised (the paper's figure 6){after}."
        found.append((f"reset{number}", caption, gaps))
        speed = arm_figures.training_speed(
            table, part, SUFFIXES[::-1], f"Epochs of tuning to 99 % train accuracy\n{below}"
        )
        caption = f"Epochs to 99 % train accuracy after a reset of the later modules (the paper's figure 11){after}."
        found.append((f"speed{number}", caption, speed))
    return found


EXPERIMENT = Experiment(
    name="module_reset",
    title="Reset of modules: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    fresh={"warm_start_epochs": 0, "reset": "none"},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
