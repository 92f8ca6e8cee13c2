"""Any Flax module for one trial, taken for a block of trials."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from plastic_jax.kernels import Activations

INNER = "net"  # the name under which the module's own parameters stand


class OneByOne(nn.Module):
    """`module` over the trials of a block, each with its own parameters and statistics.

    The module is called with images [B, H, W, C], normalised, and `train`; it gives logits [B, classes]. Its norms keep
    running statistics in the collection `batch_stats`. What it sows as `units` are its hidden units' activations.
    """

    module: nn.Module

    @nn.compact
    def __call__(self, images: Activations, *, train: bool) -> Array:
        """Logits [T, B, classes]."""
        over_trials = nn.vmap(
            lambda module, one: module(one, train=train),
            variable_axes={"params": 0, "batch_stats": 0, "units": 0},
            split_rngs={"params": True},
        )
        inner = self.module.clone(name=INNER, parent=self)
        values_TBHWC = images.kernels.by_trial(images, images.values).values
        return over_trials(inner, values_TBHWC).astype(images.kernels.real)

    def initial(self, key: Array, shape_HWC: tuple[int, int, int], real: jnp.dtype) -> dict:
        """One trial's variables as the module itself draws them."""
        found = self.module.init(key, jnp.zeros((1, *shape_HWC), real), train=False, mutable=["params", "batch_stats"])
        return {name: {INNER: found[name]} if name in found else {} for name in ("params", "batch_stats")}
