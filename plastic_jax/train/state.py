"""The trees that cross the jit boundary: what is carried, what a stage asks for, what is measured.

Shapes are those of one trial; in a batch each leaf has a leading trial axis. N: train examples; V: examples held back.
"""

from typing import Any, TypeAlias

import numpy as np
from flax import struct

from plastic_jax.data import Dataset

Tree: TypeAlias = Any  # a network's own tree of arrays
Array: TypeAlias = Any  # of the host or of a device


@struct.dataclass
class State:
    """What training carries from step to step: all of it is in a checkpoint."""

    params: Tree
    batch_stats: Tree  # running statistics; empty without BatchNorm
    optimiser: Tree
    order: Array  # [N] int32, the current epoch's order of local example numbers, members first
    step: Array  # int32, steps of this stage
    epoch: Array  # int32, whole epochs of this stage
    total: Array  # int32, steps over all stages
    done: Array  # bool, the stage ended by accuracy
    diverged: Array  # bool, a non-finite loss or parameter: the trial stands still from then on
    memory: dict[str, Tree] = struct.field(default_factory=dict)  # what interventions remember, by their names


@struct.dataclass
class Stage:
    """The dynamic values of a `trial.Stage`: changing one compiles nothing."""

    seed: Array  # uint32
    stream: Array  # int32, of the stage's orders
    size: Array  # int32, examples: the first of the trial's permutation
    steps: Array  # int32, planned
    learning_rate: Array  # real
    schedule: Array  # int32, a place in `config.SCHEDULES`
    accuracy: Array  # real, train accuracy that ends the stage; 0: none does
    restart_batch_stats: Array  # bool
    reset_optimizer: Array  # bool
    redrawn: Array  # [modules] bool, re-initialised when the stage starts
    prefix: Array  # int32, smooth transition: examples it starts from
    gamma: Array  # float32, smooth transition: its rate; `trial.NO_MIXTURE` for an ordinary stage
    acting: dict[str, Array] = struct.field(default_factory=dict)  # bool, by intervention
    strengths: dict[str, Array] = struct.field(default_factory=dict)  # real, the interventions' dynamic fields


@struct.dataclass
class Sample:
    """A trial's own view of the train set, as `sampler.TrainSet`."""

    ids: Array  # [N] int32
    labels: Array  # [N] int32
    permutation: Array  # [N] int32
    held_back: Array  # [V] int32


@struct.dataclass
class Beginning:
    """How a slot gets its next node."""

    fresh: Array  # bool, from the trial's initialisation
    begin: Array  # bool, at the start of a stage
    resume: Array  # bool, a stage that ended by accuracy is continued


@struct.dataclass
class Metrics:
    """What a chunk measured; scalars. Train figures are means over the last epoch's own batches."""

    train_loss: Array
    train_accuracy: Array
    test_loss: Array
    test_accuracy: Array
    validation_loss: Array | None  # None where no examples were held back
    validation_accuracy: Array | None
    step: Array
    epoch: Array
    total: Array
    done: Array
    diverged: Array
    diagnostics: dict[str, Array] = struct.field(default_factory=dict)  # by column


@struct.dataclass
class Sums:
    """Sums over an epoch's batches."""

    loss: Array
    correct: Array  # int32
    count: Array  # int32


@struct.dataclass
class Data:
    """The resident data: uint8 images [n, H, W, C] and int32 labels [n] of both splits."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def resident(dataset: Dataset) -> Data:
    """The arrays that stay on the device, still on the host."""
    return Data(
        dataset.train_images,
        dataset.train_labels.astype(np.int32),
        dataset.test_images,
        dataset.test_labels.astype(np.int32),
    )
