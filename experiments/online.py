"""Data that arrive in chunks: the online setting of Ash & Adams (arXiv 1910.08475), on which the paper builds.

    python -m experiments.online                # quickstart: digits, 47 s
    python -m experiments.online --preset=paper # ResNet-18 on CIFAR-10 in ten chunks, for accelerators

After each chunk a network is trained on all the examples so far, until 99 % train accuracy: warm, from where the last
stage ended, or fresh, from a new initialisation. Expected (Ash & Adams): the warm one generalises worse, from the first
chunks on.

The quickstart's time: two CPU cores, 2026-11-22, beside other work.
"""

from typing import Any

from plastic_jax.report import arm_figures
from plastic_jax.results.settings import Setting
from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Drawing, Experiment, Table

from . import warm_start

COMMON = dict(
    intervention=("reinitialise", "none"),
    stage_accuracy=0.99,
    metric_epochs=1,  # where training has just ended
    eval_every=1000,  # at the stages' ends alone
    equal_updates=False,
)
QUICKSTART = {
    **warm_start.QUICKSTART,  # the same data and network
    **COMMON,
    "warm_start_epochs": 0,  # without effect
    "chunk_examples": 50,
    "tuning_epochs": 300,
    "seeds": 32,
}
PAPER = dict(COMMON, chunk_examples=5000, tuning_epochs=350)  # sizes and the cap are ours


def draw(table: Table, summary: list[dict[str, Any]], setting: Setting, subtitle: str) -> list[Drawing]:
    """Test accuracy after each chunk, warm and fresh, and the gap."""
    canvas = arm_figures.online_curves(table, setting, f"Chunks of examples arrive, and training goes on\n{subtitle}")
    caption = "Test accuracy after each chunk, warm and fresh, and the gap (the online setting of Ash & Adams)."
    return [("online", caption, canvas)]


EXPERIMENT = Experiment(
    name="online",
    title="Online: the generalisation gap after each chunk",
    presets={"quickstart": QUICKSTART, "paper": PAPER},
    fresh={"intervention": "reinitialise"},
    draw=draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
