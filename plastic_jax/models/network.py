"""The one boundary between training, written for one trial, and networks, written for a block of them.

`Network.gradients` and `Network.evaluate` are functions of one trial with a batching rule: under `jax.vmap` the stacked
trials of a block reach the network as a whole, whatever is vmapped around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.custom_batching import custom_vmap

from plastic_jax import kernels, streams
from plastic_jax.kernels import Form
from plastic_jax.models.flax_module import OneByOne

Tree = Any  # nested dicts of arrays, by the names of the network's modules


@struct.dataclass
class Gradients:
    """What one training step needs of the network, for one trial."""

    loss: Array  # mean cross-entropy
    correct: Array  # int32, hits in the batch
    batch_stats: Tree  # the new running statistics
    gradients: Tree


class Network:
    """A module and the form that its blocks of trials are computed in; its functions are those of one trial."""

    def __init__(
        self, module: nn.Module, shape_HWC: tuple[int, int, int], initialisation: str, compute_dtype: str, form: Form
    ):
        self.module, self.shape, self.initialisation = module, shape_HWC, initialisation
        self.compute_dtype, self.form = compute_dtype, form
        self.gradients = self._boundary(self._gradients)
        """(params, batch_stats, images [B, H, W, C] uint8, labels [B]) -> Gradients."""
        self.evaluate = self._boundary(self._evaluate)
        """(params, batch_stats, images, labels, counted [B] bool) -> (sum of losses, hits), in evaluation mode."""
        self.logits = self._boundary(self._logits)
        """(params, batch_stats, images) -> logits [B, classes], in evaluation mode."""
        self.hidden = self._boundary(self._hidden)
        """(params, batch_stats, images) -> what the hidden units are, [B, .., C] by the name of their layer."""

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """Draws one trial's parameters, and its statistics of mean 0 and variance 1 (empty without BatchNorm).

        Weights follow `initialisation`. `pytorch`: weights and biases uniform within 1 / sqrt(fan_in), its default
        (kaiming uniform with a = sqrt(5)); `he` and `lecun`: normal, cut off at two standard deviations, with variance
        2 / fan_in and 1 / fan_in, and zero biases. Norms start with scale 1 and bias 0.

        All random numbers are one draw in float32, cut up in the order of the parameters' names, kernels of
        convolutions as [h, w, I, O], and then cast. So a float64 network starts from the float32 network's values, bit
        for bit, and the draw compiles in a fraction of a second.
        """
        if isinstance(self.module, OneByOne):
            drawn = self.module.initial(key, self.shape, kernels.of(self.form, 1, self.compute_dtype).real)
            return drawn["params"], drawn["batch_stats"]
        shapes = self.shapes()
        leaves: dict[tuple[str, ...], jax.ShapeDtypeStruct] = flatten_dict(shapes["params"])  # pyright: ignore
        fans_in = {path: _fan_in(path, leaves) for path in leaves if _drawn(path, leaves, self.initialisation)}
        variance = {"pytorch": 1 / 3, "he": 2.0, "lecun": 1.0}[self.initialisation]  # times fan_in
        drawn = _unit_variance(self.initialisation, key, sum(leaves[path].size for path in fans_in))
        params, start = {}, 0
        for path in sorted(leaves):
            leaf = leaves[path]
            if path not in fans_in:
                params[path] = _constant(path, leaf)
                continue
            values, start = drawn[start : start + leaf.size], start + leaf.size
            if len(leaf.shape) == 4:
                outputs, *rest = leaf.shape
                values = values.reshape(*rest, outputs).transpose(3, 0, 1, 2)
            params[path] = ((variance / fans_in[path]) ** 0.5 * values.reshape(leaf.shape)).astype(leaf.dtype)
        stats = jax.tree.map_with_path(
            lambda path, leaf: _constant([entry.key for entry in path], leaf), shapes["batch_stats"]
        )
        return unflatten_dict(params), stats

    def shapes(self) -> dict[str, Tree]:
        """Shapes and types of one trial's `params` and `batch_stats`."""
        one = kernels.of(self.form, 1, self.compute_dtype)

        def init() -> Tree:
            images = one.enter(jnp.zeros((1, 1, *self.shape), jnp.uint8))
            return self.module.init(jax.random.key(0), images, train=False, mutable=["params", "batch_stats"])

        stacked = jax.eval_shape(init)
        cut = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
        return {"params": cut["params"], "batch_stats": cut.get("batch_stats", {})}

    def _hidden(self, params: Tree, stats: Tree, images: Array) -> dict[str, Array]:
        trials = jax.tree.leaves(params)[0].shape[0]
        own = kernels.of(self.form, trials, self.compute_dtype)
        variables = {"params": params, "batch_stats": stats}
        _, found = self.module.apply(variables, own.enter(images), train=False, mutable=["units"])
        layers: dict[str, Any] = flatten_dict(found.get("units", {}), sep="/")  # pyright: ignore
        return {name: own.leave(values[0]) for name, values in layers.items()}

    def block(self, params: Tree, stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        """Logits [T, B, classes] and new statistics of a block."""
        trials = jax.tree.leaves(params)[0].shape[0]
        entered = kernels.of(self.form, trials, self.compute_dtype).enter(images)
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return self.module.apply(variables, entered, train=False), stats  # pyright: ignore
        logits, new = self.module.apply(variables, entered, train=True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})  # pyright: ignore

    def _gradients(self, params: Tree, stats: Tree, images: Array, labels: Array) -> Gradients:
        trials = jax.tree.leaves(params)[0].shape[0]
        labels = jnp.broadcast_to(labels, (trials, labels.shape[-1]))

        def loss(params: Tree) -> tuple[Array, Any]:
            logits, new = self.block(params, stats, images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(1)
            return losses.sum(), (losses, logits, new)  # each trial's loss depends on its own parameters alone

        (_, (losses, logits, new)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        correct = (logits.argmax(-1) == labels).sum(1, dtype=jnp.int32)
        return Gradients(losses, correct, new, gradients)

    def _evaluate(self, params: Tree, stats: Tree, images: Array, labels: Array, counted: Array) -> tuple[Array, Array]:
        logits = self._logits(params, stats, images)
        labels = jnp.broadcast_to(labels, logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        counted = jnp.broadcast_to(counted, logits.shape[:2])
        hits = ((logits.argmax(-1) == labels) & counted).sum(1, dtype=jnp.int32)
        return jnp.where(counted, losses, jnp.zeros((), losses.dtype)).sum(1), hits

    def _logits(self, params: Tree, stats: Tree, images: Array) -> Array:
        return self.block(params, stats, images, train=False)[0]

    def _boundary(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """A function of one trial from that of a block; parameters and statistics come stacked, the rest perhaps."""

        @custom_vmap
        def one(*trial: Any) -> Any:
            stacked = jax.tree.map(lambda leaf: leaf[None], trial)
            return jax.tree.map(lambda leaf: leaf[0], block(*stacked))

        @one.def_vmap
        def _(trials: int, batched: Any, *arguments: Any) -> Any:
            stacked = list(arguments)
            for i in range(2):  # parameters and statistics
                spread = lambda leaf, own: leaf if own else jnp.broadcast_to(leaf, (trials, *leaf.shape))  # noqa: E731
                stacked[i] = jax.tree.map(spread, arguments[i], batched[i])
            if kernels.batched(self.form):
                out = block(*stacked)
            else:
                own = [n for n in range(len(stacked)) if n < 2 or all(jax.tree.leaves(batched[n]))]

                def each(mine: Any) -> Any:
                    given = [mine[own.index(n)] if n in own else stacked[n] for n in range(len(stacked))]
                    return one(*given)

                out = jax.lax.map(each, [stacked[n] for n in own])
            return out, jax.tree.map(lambda _: True, out)

        return one


def _drawn(path: tuple[str, ...], leaves: dict[tuple[str, ...], Any], initialisation: str) -> bool:
    if path[-1] == "kernel":
        return True
    return initialisation == "pytorch" and (*path[:-1], "kernel") in leaves


def _fan_in(path: tuple[str, ...], leaves: dict[tuple[str, ...], jax.ShapeDtypeStruct]) -> int:
    """Inputs of one output: of a convolution's kernel [O, h, w, I] or a linear layer's [D, O]."""
    shape = leaves[*path[:-1], "kernel"].shape
    return math.prod(shape[1:]) if len(shape) == 4 else shape[0]


@streams.pinned
def _unit_variance(initialisation: str, key: Array, size: int) -> Array:
    """[size] independent float32 values with mean 0 and variance 1."""
    if initialisation == "pytorch":
        return jax.random.uniform(key, (size,), jnp.float32, -1, 1) * 3**0.5
    # The standard deviation of a standard normal distribution cut off at -2 and 2.
    return jax.random.truncated_normal(key, -2, 2, (size,), jnp.float32) / 0.8796256610342398


def _constant(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
    """What is not drawn: ones for a norm's scale and running variance, else zeros."""
    fill = 1 if path[-1] in ("scale", "var") else 0
    return jnp.full(leaf.shape, fill, leaf.dtype)
