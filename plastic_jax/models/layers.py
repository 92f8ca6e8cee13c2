"""The layers that networks are made of, for a block of T trials at a time.

They are Flax modules whose parameters and statistics have a leading trial axis; what flows between them are
`Activations`, whose kernels compute. Initialisation and normalisation follow PyTorch, not Flax, wherever the two
differ. Names of axes: T trials, B examples, H height, W width, C channels in, O out, h and w a kernel's taps.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from plastic_jax.kernels import Activations

MOMENTUM = 0.9  # share of the old running statistics that is kept; PyTorch calls it 0.1
_ZEROS, _ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()  # what is random, `network.py` draws


class Conv(nn.Module):
    """A convolution with `features` channels, `taps` x `taps`, padded by (taps - 1) / 2 on all sides."""

    features: int
    taps: int = 3
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """(B, H, W, C) -> (B, H / stride, W / stride, features), rounded up."""
        trials, real = x.kernels.trials, x.kernels.real
        shape = (trials, self.features, self.taps, self.taps, x.shape[-1])
        kernel_TOhwI = self.param("kernel", _ZEROS, shape, real)
        bias_TO = self.param("bias", _ZEROS, (trials, self.features), real) if self.use_bias else None
        return x.kernels.convolution(x, kernel_TOhwI, bias_TO, self.stride)


class Dense(nn.Module):
    """A linear layer with a bias."""

    features: int
    full_precision: bool = False  # even where the rest computes in bfloat16

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """(B, D) -> (B, features)."""
        trials, real = x.kernels.trials, x.kernels.real
        kernel_TDO = self.param("kernel", _ZEROS, (trials, x.shape[-1], self.features), real)
        bias_TO = self.param("bias", _ZEROS, (trials, self.features), real)
        return x.kernels.linear(x, kernel_TDO, bias_TO, real if self.full_precision else x.kernels.dtype)


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm over all axes but the last.

    In training, y = scale * (x - mean) / sqrt(var + 1e-5) + bias with the batch's mean and biased variance over its n
    values a channel, and the running statistics become 0.9 * running + 0.1 * mean and
    0.9 * running + 0.1 * var * n / (n - 1). (Flax's own keeps the biased variance.) In evaluation mean and var are the
    running ones. Statistics and normalisation are float32 whatever x is, or float64 where x is.
    """

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """Of the same shape."""
        shape, real = (x.kernels.trials, x.shape[-1]), x.kernels.real
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, real)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, real)
        scale, bias = self.param("scale", _ONES, shape, real), self.param("bias", _ZEROS, shape, real)
        if not train:
            return x.kernels.normalise(x, running_mean.value, running_var.value, scale, bias)
        n = math.prod(x.shape[:-1])
        x, mean, var = x.kernels.batch_norm(x, scale, bias)
        running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
        unbiased = var * (n / max(n - 1, 1))
        running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * unbiased
        return x


class LayerNorm(nn.Module):
    """Each example normalised over all its values, then a scale and a bias for each channel.

    PyTorch's `LayerNorm(C)` for (B, C) and `GroupNorm(1, C)` for (B, H, W, C); biased variance.
    """

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """Of the same shape."""
        del train
        shape, real = (x.kernels.trials, x.shape[-1]), x.kernels.real
        scale, bias = self.param("scale", _ONES, shape, real), self.param("bias", _ZEROS, shape, real)
        return x.kernels.layer_norm(x, scale, bias)


def normalise(norm: str, name: str, x: Activations, train: bool) -> Activations:
    """The norm of that name (`batch`, `layer`), or x for `none`; call it within a compact module."""
    if norm == "none":
        return x
    return (BatchNorm if norm == "batch" else LayerNorm)(name=name)(x, train=train)


def relu(x: Activations) -> Activations:
    """max(x, 0)."""
    return x.kernels.relu(x)


def add(x: Activations, y: Activations) -> Activations:
    """x + y."""
    return x.kernels.add(x, y)


def shared(x: Activations) -> Activations:
    """x, of which more than one layer makes use: then it is computed once."""
    return x.kernels.shared(x)


def pool(x: Activations) -> Activations:
    """Means over height and width: (B, H, W, C) -> (B, C), in full precision."""
    return x.kernels.pool(x)


def flatten(x: Activations) -> Activations:
    """(B, H, W, C) -> (B, H W C)."""
    return x.kernels.flatten(x)


def logits(x: Activations) -> Array:
    """The values of the last layer, [T, B, classes]."""
    return x.values
