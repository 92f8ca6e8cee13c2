"""What an intervention or a diagnostic sees of one trial, at one moment."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
from jax import Array

from plastic_jax.models.units import Units

Tree = Any


@struct.dataclass
class Trained:
    """What training has made of one trial so far, and what an intervention may change."""

    params: Tree
    batch_stats: Tree
    optimiser: Tree  # Optax's state


@struct.dataclass
class View:
    """One trial at one moment; functions are called only where they are needed.

    The fields of all methods are attributes too: `view.shrink` is the strength of this trial, an array.
    """

    trained: Trained
    strengths: Mapping[str, Array]  # of the dynamic fields, by name; scalars
    key: Array  # random, for this method at this moment alone
    step: Array  # int32, updates over all stages
    fresh: Callable[[], Trained] = struct.field(pytree_node=False)
    """Draws a trial's beginning anew: parameters, statistics and optimiser state."""
    batch: Callable[[], tuple[Array, Array]] = struct.field(pytree_node=False)
    """Images [B, H, W, C] and labels [B], the ones trained on."""
    hidden: Callable[[Array], Mapping[str, Array]] = struct.field(pytree_node=False)
    """The activations of all hidden units on images, in evaluation mode: [B, .., C] by the name of their layer."""
    units: tuple[Units, ...] = struct.field(pytree_node=False)  # as the model declares them
    point: Any = struct.field(pytree_node=False)  # the config's static values
    optimiser: Any = struct.field(pytree_node=False)  # Optax's transformation, whose state is `trained.optimiser`
    flax_layout: bool = struct.field(pytree_node=False, default=False)  # kernels are [h, w, I, O], not [O, h, w, I]
    memory: Tree = None  # what the intervention remembers

    @property
    def params(self) -> Tree:
        """The trial's parameters."""
        return self.trained.params

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.strengths:
            raise AttributeError(name)
        return self.strengths[name]
