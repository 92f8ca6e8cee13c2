"""Choices between trees of arrays, for one trial or for a block of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from plastic_jax.train.state import Tree


@custom_vmap
def some(flag: Array) -> Array:
    """The flag; of a block of trials, whether it is set for any: what none of them needs is not computed."""
    return flag


@some.def_vmap
def _(_: int, __: Any, flags: Array) -> tuple[Array, bool]:
    return flags.any(), False


def either(flag: Array, new: Tree, old: Tree) -> Tree:
    """`new` where the flag is set, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def redraw(modules: Array, new: Tree, old: Tree) -> Tree:
    """The leaves of `modules` [k] bool from `new`, the others bit for bit from `old` (the paper's figure 6).

    What is of no module, an optimiser's count of steps, is new where all modules are.
    """

    def choose(path: Any, a: Array, b: Array) -> Array:
        names = [str(getattr(entry, "key", "")) for entry in path]
        numbers = [int(name.removeprefix("module_")) for name in names if name.startswith("module_")]
        return jnp.where(modules[numbers[0] - 1] if numbers else modules.all(), a, b)

    return jax.tree.map_with_path(choose, new, old)


def vectors_finite(tree: Tree) -> Array:
    """Whether all leaves of one axis are: statistics, scales, biases and their gradients."""
    vectors = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 1]
    return jnp.isfinite(jnp.concatenate(vectors)).all() if vectors else jnp.bool_(True)


def finite(tree: Tree) -> Array:
    """Whether all of it is."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
