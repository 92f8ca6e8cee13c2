"""The warm-start study: the paper's figures 1, 2 and 8-10.

    python -m experiments.warm_start                          # quickstart: digits, 63 s
    python -m experiments.warm_start --preset=paper           # ResNet-18 on CIFAR-10, 200 trials, for accelerators
    python -m experiments.warm_start --preset=paper --dry_run
    python -m experiments.warm_start --preset=ash_adams       # w = 16, the protocol of Ash & Adams' table 1

A network is trained on half of the train set for some epochs, then on all of it, and compared with one that started
fresh with the same tuning budget. Expected (paper): the longer the warm start, the worse the test accuracy, although
every network fits its train set.

The quickstart's time: two CPU cores, 2026-11-22.
"""

from plastic_jax.running.cli import main
from plastic_jax.running.experiment import Experiment

QUICKSTART = dict(
    dataset="digits",
    train_examples=300,
    label_noise=0.2,
    model="mlp",
    width=100,
    depth=4,
    norm="none",
    initialisation="he",  # with PyTorch's default, 100 epochs leave some trials short of fitting their data
    batch_size=32,
    warm_start_epochs=(0, 10, 50, 200),
    tuning_epochs=100,
    metric_epochs=20,
    seeds=32,
)
# The paper's common setting is the fields' defaults; the lengths are ours (the paper does not list its own).
PAPER = dict(
    warm_start_epochs=(0, 1, 2, 5, 10, 20, 50, 100, 200, 350),
    optimizer=("adam", "rmsprop", "sgd", "momentum"),
)
# Ash & Adams' table 1 as their published code has it: two thirds of the train split to fit, a random half of it first;
# the held-back third is their test set, our `validation_accuracy`. Both stages end at 99 % train accuracy; the cap of
# 1000 epochs is ours. Their CIFAR-10 numbers, fresh -> warm: Adam 78.0 -> 74.4, SGD 56.2 -> 51.7 %.
ASH_ADAMS = dict(
    width=16,
    validation_fraction=1 / 3,
    warm_start_epochs=(0, 1000),
    tuning_epochs=1000,
    metric_epochs=1,
    stage_accuracy=0.99,
    batch_stats="restart",
    optimizer=("adam", "sgd"),
    equal_updates=False,
)

EXPERIMENT = Experiment(
    name="warm_start",
    title="Warm start: the generalisation gap",
    presets={"quickstart": QUICKSTART, "paper": PAPER, "ash_adams": ASH_ADAMS},
    fresh={"warm_start_epochs": 0},
)

if __name__ == "__main__":
    main(EXPERIMENT)
