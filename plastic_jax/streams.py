"""Named random streams of a seed: every random number of a trial comes from one of them (contract 1)."""

import functools
import zlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

INITIALISATION = "initialisation"  # the trial's first parameters
TRAIN_SET = "train set"  # which examples make up a smaller train set, which are held back
SUBSET = "subset"  # the permutation whose prefixes are the stages' data sets
CLASSES = "classes"  # the order in which classes are dealt to nested stages
LABEL_NOISE = "label noise"
ORDER = "order"  # order of stage s, epoch e
MIXTURE = "mixture"  # draws with replacement of a smooth transition
INTERVENTION = "intervention"  # fresh draws when a stage starts, or at an update
METHOD = "method"  # of an intervention or a diagnostic, with its name

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")


def pinned(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """A function that draws, made independent of `jax_threefry_partitionable`, which a shell may have set."""

    @functools.wraps(draw)
    def always_alike(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn:
        with jax.threefry_partitionable(True):
            return draw(*args, **kwargs)

    return always_alike


def stream(seed: jax.Array | int, name: str, *counters: jax.Array | int) -> jax.Array:
    """The key of stream `name` of `seed`, folded with `counters` (stage, epoch, ...); a typed key, shape ().

    A function of its arguments alone; `seed` and `counters` may be traced.
    """
    seed = jnp.asarray(seed, jnp.uint32)
    # What jax.random.key makes of it, but for jax_random_seed_offset.
    key = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl="threefry2x32")
    key = jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
    for counter in counters:
        key = jax.random.fold_in(key, jnp.asarray(counter, jnp.uint32))
    return key
