"""The units of a network: which parameters make a hidden unit, and which read it.

A model declares its units once; what acts on units or measures them is then written once for all models. Names are
those of the parameters' tree, joined by `/`: `module_2/block_1/conv_1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

Tree = Any


@dataclass(frozen=True)
class Units:
    """The units of one hidden layer: the channels of a convolution, or the outputs of a linear layer.

    `seen`: where the network's `sow("units", ...)` puts their activations, after the non-linearity; several where the
    same channels go through several blocks by identity. `incoming`: the layers whose outputs they are; several where
    branches are added up. `norms`: the norms that these pass. `outgoing`: the layers that read them.
    """

    seen: tuple[str, ...]
    incoming: tuple[str, ...]
    outgoing: tuple[str, ...]
    norms: tuple[str, ...] = ()


def chosen(units: Sequence[Units], which: Sequence[Array], tree: Tree, side: str, last: bool = False) -> Tree:
    """A mask over a tree of parameters, of their statistics or of moments: what belongs to some units.

    Args:
      units: as the model declares them.
      which: for each of them, [C] bool.
      tree: of one trial, with the structure of the parameters or of a part of it.
      side: `incoming` (kernels, biases, and all that a norm has) or `outgoing` (kernels alone).
      last: whether kernels of convolutions are [h, w, I, O], as Flax's own layers have them, instead of [O, h, w, I].

    Returns:
      The tree's structure, with leaves of bool that can be broadcast to the tree's.
    """
    leaves: dict[str, Array] = flatten_dict(tree, sep="/")  # pyright: ignore
    masks = {path: jnp.zeros((1,) * leaf.ndim, bool) for path, leaf in leaves.items()}
    for layer, mask in zip(units, which, strict=True):
        named = (*layer.incoming, *layer.norms) if side == "incoming" else layer.outgoing
        for path, leaf in leaves.items():
            owner, _, kind = path.rpartition("/")
            if owner in named and (side == "incoming" or kind == "kernel"):
                masks[path] = masks[path] | _along(mask, leaf, _axis(leaf, side, last))
    return unflatten_dict(masks, sep="/")


def _axis(leaf: Array, side: str, last: bool) -> int:
    """The axis of a leaf along which the units lie."""
    if leaf.ndim == 4 and not last:
        return 0 if side == "incoming" else 3
    return leaf.ndim - 1 if side == "incoming" else leaf.ndim - 2


def _along(mask: Array, leaf: Array, axis: int) -> Array:
    """[C] bool along an axis, repeated where the layer reads each unit at many places of a flattened image."""
    repeated = jnp.tile(mask, leaf.shape[axis] // mask.shape[0])
    return jax.lax.expand_dims(repeated, [n for n in range(leaf.ndim) if n != axis])
