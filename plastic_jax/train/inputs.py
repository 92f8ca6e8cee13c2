"""What the slots train, as host arrays: each slot's own view of the train set and its stage's dynamic values."""

from collections.abc import Sequence

import numpy as np

from plastic_jax import models
from plastic_jax.data import Dataset, sampler
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.methods.schedules import SCHEDULES
from plastic_jax.study.config import Config
from plastic_jax.study.plan import Node
from plastic_jax.train.state import Sample, Stage


class Samples:
    """The slots' samples, `arrays` [slots, ...]; a seed's is drawn once."""

    def __init__(self, point: Config, dataset: Dataset, slots: int):
        self._dataset = dataset
        self._drawn: dict[tuple, sampler.TrainSet] = {}
        pool = dataset.spec.train_examples
        n = sampler.train_size(pool, point.train_examples, point.validation_fraction)
        held = sampler.validation_size(pool, point.validation_fraction)
        self.arrays = Sample(*(np.zeros((slots, size), np.int32) for size in (n, n, n, held)))

    def put(self, slot: int, node: Node) -> None:
        """Write the sample of the node's trials into a slot's place."""
        point, seed, key = node.trial.point, node.trial.seed, node.trial.sample
        if key not in self._drawn:
            self._drawn[key] = sampler.train_set(
                seed,
                self._dataset.train_labels,
                self._dataset.spec.classes,
                train_examples=point.train_examples,
                validation_fraction=point.validation_fraction,
                label_noise=point.label_noise,
                nesting=point.nesting,
            )
        for name, whole in vars(self.arrays).items():
            whole[slot] = getattr(self._drawn[key], name)


def stages(nodes: Sequence[Node | None], point: Config, real: np.dtype, interventions: Sequence[str] = ()) -> Stage:
    """The dynamic values of each slot's stage.

    Args:
      nodes: each slot's node, None for a free one.
      point: the program's static values.
      real: the kind of real numbers.
      interventions: those that the program has.
    """
    kinds = {
        "seed": np.uint32, "stream": np.int32, "size": np.int32, "steps": np.int32, "learning_rate": real,
        "accuracy": real, "restart_batch_stats": bool, "reset_optimizer": bool,
        "prefix": np.int32, "gamma": np.float32, "schedule": np.int32,
    }  # fmt: skip
    arrays = {name: np.zeros(len(nodes), kind) for name, kind in kinds.items()}
    arrays["size"][:] = arrays["prefix"][:] = 1
    methods = {name: INTERVENTIONS[name].fields for name in interventions}
    acting = {name: np.zeros(len(nodes), bool) for name in methods}
    dynamic = [name for fields in methods.values() for name, field in fields.items() if field.kind == "dynamic"]
    strengths = {name: np.zeros(len(nodes), real) for name in dynamic}
    redrawn = np.zeros((len(nodes), models.modules(point.model, point.depth)), bool)
    for i, node in enumerate(nodes):
        if node is None:
            continue
        for name, array in arrays.items():
            if name == "seed":
                array[i] = node.trial.seed
            elif name == "schedule":
                array[i] = SCHEDULES.index(node.trial.point.schedule)
            elif name == "steps":
                array[i] = sampler.stage_steps(node.stage.size, node.stage.epochs, point.batch_size)
            else:
                array[i] = max(1, node.stage.prefix) if name == "prefix" else getattr(node.stage, name)
        for name in node.stage.acting:
            acting[name][i] = True
        for name, value in node.stage.strengths:
            strengths[name][i] = value
        redrawn[i, [number - 1 for number in node.stage.redrawn]] = True
    return Stage(**arrays, redrawn=redrawn, acting=acting, strengths=strengths)
