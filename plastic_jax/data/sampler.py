"""One sampler for all stages: a permutation of the trial's train set, a prefix of it, an order for each epoch.

A trial's train set has N examples, known by their *local* numbers 0 .. N-1, which depend on the seed alone; a
stage's data set is the first `size` entries of the trial's permutation. An epoch's order is drawn over local
numbers, not over positions in the permutation, so that arms with other permutations or sizes see the same tuning
batches (contract 2). An incomplete batch is filled up from the next epoch: step k takes the examples kB .. kB+B-1
of the endless sequence of epochs, epoch e ends with step ceil(e size / B), and its evaluation falls there.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax import streams


@dataclass(frozen=True)
class TrainSet:
    """A trial's own view of the train set, drawn on the host.

    `ids` [N] int32: the data set's example behind each local number; `labels` [N] int32: labels trained on;
    `permutation` [N] int32 of local numbers; `held_back` [V] int32: examples kept for validation; `sizes`
    [n+1] int32: of the nested data sets D_1 .. D_{n+1}, prefixes of the permutation.
    """

    ids: np.ndarray
    labels: np.ndarray
    permutation: np.ndarray
    held_back: np.ndarray
    sizes: np.ndarray


def validation_size(pool: int, fraction: float) -> int:
    """Number of the `pool` train examples held back: the nearest whole number, halves up."""
    return int(np.floor(pool * fraction + 0.5))


def train_size(pool: int, train_examples: int, validation_fraction: float) -> int:
    """N, the number of examples that a trial trains on."""
    return train_examples or pool - validation_size(pool, validation_fraction)


def subset_size(size: int, fraction: float) -> int:
    """Size of the pretraining subset: the nearest whole number, halves up, at least 1."""
    return max(1, int(np.floor(size * fraction + 0.5)))


def _even(count: int, parts: int) -> np.ndarray:
    """Sizes of `parts` parts of `count` things, [parts]; they differ by at most one, the larger ones first."""
    return count // parts + (np.arange(parts) < count % parts)


def nested_sizes(size: int, classes: int, stages: int, uniform_fraction: float) -> tuple[int, ...]:
    """Sizes of D_1 .. D_{n+1} as if all classes were of one size; exact where `uniform_fraction` is 1."""
    uniform = int(np.floor(size * uniform_fraction + 0.5))
    shares = np.cumsum(_even(classes, stages + 1)) / classes
    by_class = np.floor((size - uniform) * shares + 0.5).astype(int)
    return tuple((np.cumsum(_even(uniform, stages + 1)) + by_class).tolist())


def nested(
    seed: int, permutation: np.ndarray, labels: np.ndarray, classes: int, stages: int, uniform_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """The permutation whose prefixes are D_1 .. D_{n+1}, [N] int32, and their sizes [n+1] int32 (figure 4, right).

    The classes are dealt at random to C_1 .. C_{n+1}, as evenly as can be. D_u is the first r N entries of
    `permutation` [N] (nearest whole number, halves up), cut evenly into n + 1 parts, and D_c the others;
    D_i = D_{i-1} + D_{u,i} + {(x, c) in D_c : c in C_i}, where c is the label trained on, `labels` [N].
    """
    parts = stages + 1
    uniform = int(np.floor(len(permutation) * uniform_fraction + 0.5))
    group = np.empty(classes, int)  # class -> i - 1, where the class is in C_i
    group[_permutation(seed, streams.CLASSES, classes)] = np.repeat(np.arange(parts), _even(classes, parts))
    stage = group[labels[permutation]]
    stage[:uniform] = np.repeat(np.arange(parts), _even(uniform, parts))
    sizes = np.cumsum(np.bincount(stage, minlength=parts))
    return permutation[np.argsort(stage, kind="stable")], sizes.astype(np.int32)


def stage_steps(size: int, epochs: int, batch_size: int) -> int:
    """Steps after which epoch number `epochs` of a stage has been seen whole."""
    return -(-epochs * size // batch_size)


@lru_cache(maxsize=512)
@streams.pinned
def _draw(seed: int, name: str, count: int) -> np.ndarray:
    """`count` uniform 32-bit words of a stream, [count] uint32, on the host's own device."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.random.bits(streams.stream(seed, name), (count,), jnp.uint32))


def _permutation(seed: int, name: str, count: int) -> np.ndarray:
    return np.argsort(_draw(seed, name, count), kind="stable").astype(np.int32)


def noisy_labels(seed: int, labels: np.ndarray, classes: int, noise: float) -> np.ndarray:
    """Each label replaced with probability `noise` by one of the other classes, uniformly; [pool] int32.

    The same draw decides for every noise level, so a higher level adds to the labels that a lower one replaced.
    """
    replaced = _draw(seed, streams.LABEL_NOISE, len(labels)) < noise * 2.0**32
    shift = 1 + (_draw(seed, streams.LABEL_NOISE + ": class", len(labels)) % max(classes - 1, 1))
    other = (labels + shift.astype(np.int32)) % classes
    return np.where(replaced, other, labels).astype(np.int32)


def train_set(
    seed: int,
    labels: np.ndarray,
    classes: int,
    *,
    train_examples: int,
    validation_fraction: float,
    label_noise: float,
    nesting: tuple[int, float] = (1, 1.0),
) -> TrainSet:
    """Draw a seed's train set, label noise and permutation from their streams.

    `labels` [pool] are the data set's own; `nesting` is (n, r) of `nested`. The held-back examples are drawn first
    and the train set from the rest, so that smaller train sets of a seed are nested in larger ones.
    """
    pool = len(labels)
    drawn = _permutation(seed, streams.TRAIN_SET, pool)
    held = validation_size(pool, validation_fraction)
    size = train_size(pool, train_examples, validation_fraction)
    ids = drawn[held : held + size]
    noisy = noisy_labels(seed, labels, classes, label_noise)
    permutation, sizes = nested(seed, _permutation(seed, streams.SUBSET, size), noisy[ids], classes, *nesting)
    return TrainSet(ids, noisy[ids], permutation, drawn[:held], sizes)


@streams.pinned
def epoch_order(
    seed: jax.Array, stream: jax.Array, epoch: jax.Array, permutation: jax.Array, size: jax.Array
) -> jax.Array:
    """Local numbers of a stage's members in the order of one epoch, [N] int32, members first.

    A random 31-bit word for each local number, sorted (ties by number); the word of an example is the same whatever
    the members are.
    """
    n = permutation.shape[0]
    words = jax.random.bits(streams.stream(seed, streams.ORDER, stream, epoch), (n,), jnp.uint32)
    member = jnp.zeros(n, bool).at[permutation].set(jnp.arange(n, dtype=jnp.int32) < size)
    words = (words >> 1) | jnp.where(member, jnp.uint32(0), jnp.uint32(1 << 31))
    numbers = jnp.arange(n, dtype=jnp.int32)
    return jax.lax.sort((words, numbers), num_keys=1, is_stable=True)[1]


def transition_probability(gamma: jax.Array, step: jax.Array, steps: jax.Array) -> jax.Array:
    """p(n) = 1 - gamma^(50 n / N): probability that step n of N draws from the whole train set (paper, figure 3).

    1 throughout for gamma = 0, the fresh arm's sampler.
    """
    passed = jnp.asarray(step, jnp.float32) / jnp.asarray(steps, jnp.float32)
    return jnp.where(gamma > 0, 1 - jnp.power(gamma, 50 * passed), jnp.ones_like(gamma))


@streams.pinned
def mixture(
    seed: jax.Array, stream: jax.Array, step: jax.Array, permutation: jax.Array, prefix: jax.Array,
    probability: jax.Array, batch_size: int,
) -> jax.Array:  # fmt: skip
    """Local numbers of a smooth transition's step, [B] int32, drawn with replacement.

    Each example comes from the whole train set with `probability`, else from the permutation's first `prefix`
    entries. The draws from the whole are over local numbers, so that all arms of a seed share them.
    """
    keys = jax.random.split(streams.stream(seed, streams.MIXTURE, stream, step), 3)
    n = permutation.shape[0]
    whole = jax.random.randint(keys[0], (batch_size,), 0, n, jnp.int32)
    part = permutation[jax.random.randint(keys[1], (batch_size,), 0, prefix, jnp.int32)]
    return jnp.where(jax.random.uniform(keys[2], (batch_size,), jnp.float32) < probability, whole, part)


def batch(
    order: jax.Array, following: jax.Array, epoch: jax.Array, step: jax.Array, size: jax.Array, batch_size: int
) -> jax.Array:
    """Local numbers of step `step`, [B] int32: the rest of `epoch`'s order, then the start of the following one's.

    A stage's data set must hold at least one batch, so a batch spans two epochs at most.
    """
    position = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32) - epoch * size
    both = jnp.concatenate([order, following])
    return both[jnp.where(position < size, position, position - size + order.shape[0])]
