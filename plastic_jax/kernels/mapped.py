"""The operations of a network for a block of trials, in JAX's own operations: the plainest kernels, for one trial.

The others are these with some of them computed otherwise. Names of axes: T trials, B examples, H height, W width, C
channels in, O channels out; K and G as in `kernels/__init__.py`. Activations are [K, B, H, W, G C], or [T, B, D] once
they have no more height and width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from plastic_jax.errors import InputError

EPSILON = 1e-5  # of all norms: PyTorch's


class Activations:
    """What flows from layer to layer: the values of all trials of a block, and the kernels that compute on them.

    Where trials share channels: `taint` holds arrays [T, C] that are not finite for a trial which has had non-finite
    values taken out (None: none need be), `clean` says that there are no such values, `seen` that taint tells of them.
    """

    def __init__(
        self,
        values: Array,
        kernels: Mapped,
        taint: tuple[Array, ...] | None = None,
        clean: bool = True,
        seen: bool = True,
    ):
        self.values, self.kernels, self.taint, self.clean, self.seen = values, kernels, taint, clean, seen

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one trial's values: (B, H, W, C) or (B, D)."""
        *rest, last = self.values.shape[1:]
        return (*rest, last // self.kernels.side_by_side(self.values))

    def with_values(self, values: Array, **changes: Any) -> Activations:
        """The same with other values."""
        kept = {"taint": self.taint, "clean": self.clean, "seen": self.seen}
        return Activations(values, self.kernels, **kept | changes)


class Mapped:
    """One trial at a time. Scales, biases and statistics are [T, C]."""

    batched: ClassVar[bool] = False
    adam: ClassVar[Any] = None  # an update in one pass over memory, where there is one

    def __init__(self, trials: int, group: int, compute_dtype: str):
        """For T = `trials` of which G = `group` side by side."""
        self.trials, self.group, self.compute_dtype = trials, group, compute_dtype
        self.dtype, self.real = dtypes(compute_dtype)

    def side_by_side(self, values: Array) -> int:
        """How many trials share these values' last axis."""
        return self.trials // values.shape[0]

    def per_channel(self, values_TC: Array, like: Array) -> Array:
        """[T, C] -> [K, 1, .., 1, G C] with the rank of `like`."""
        return values_TC.reshape(like.shape[0], *(1,) * (like.ndim - 2), like.shape[-1])

    def per_trial(self, values: Array) -> Array:
        """[K, 1, .., 1, G C] -> [T, C]."""
        return values.reshape(self.trials, -1)

    def enter(self, images: Array) -> Activations:
        """Images [T, B, H, W, C], or [B, H, W, C] for all trials alike; bytes are normalised: mean .5, deviation .5."""
        if images.ndim == 4:
            images = jnp.broadcast_to(images, (self.trials, *images.shape))
        return Activations(self.normalised_images(images), self)

    def normalised_images(self, images: Array) -> Array:
        """(x / 255 - 0.5) / 0.5 (A&A) in full precision, then in the type to compute in."""
        if not jnp.issubdtype(images.dtype, jnp.floating):
            images = (images.astype(self.real) / 255 - 0.5) / 0.5
        return images.astype(self.dtype)

    def convolution(self, x: Activations, kernel_TOhwI: Array, bias_TO: Array | None, stride: int) -> Activations:
        """Padded by (h - 1) / 2 on all sides, as PyTorch does ('SAME' differs where the stride is 2)."""
        pad = (kernel_TOhwI.shape[2] - 1) // 2
        values = self.convolve(x, kernel_TOhwI.astype(self.dtype), stride, pad)
        if bias_TO is not None:
            values = values + self.per_channel(bias_TO.astype(self.dtype), values)
        return x.with_values(values)

    def convolve(self, x: Activations, kernel_TOhwI: Array, stride: int, pad: int) -> Array:
        """The convolution alone: [K, B, H', W', G O]."""
        return one_convolution(x.values[0], kernel_TOhwI[0], stride, pad)[None]

    def linear(self, x: Activations, kernel_TDO: Array, bias_TO: Array, dtype: Any) -> Activations:
        """[T, B, D] -> [T, B, O], computed in `dtype`."""
        values = self.product(x.values.astype(dtype), kernel_TDO.astype(dtype))
        return x.with_values(values + bias_TO[:, None].astype(dtype))

    def product(self, values_TBD: Array, kernel_TDO: Array) -> Array:
        """A matrix product for each trial."""
        return jnp.matmul(values_TBD[0], kernel_TDO[0])[None]

    def batch_norm(self, x: Activations, scale_TC: Array, bias_TC: Array) -> tuple[Activations, Array, Array]:
        """Normalised by the batch's own mean and biased variance, which are [T, C]."""
        values = x.values.astype(self.real)
        axes = tuple(range(1, values.ndim - 1))
        # Two passes: the mean of squares less the squared mean cancels in float32.
        mean = values.mean(axes, keepdims=True)
        var = jnp.square(values - mean).mean(axes, keepdims=True)
        mean, var = self.per_trial(mean), self.per_trial(var)
        return self.normalise(x, mean, var, scale_TC, bias_TC), mean, var

    def normalise(self, x: Activations, mean: Array, var: Array, scale: Array, bias: Array) -> Activations:
        """scale (x - mean) / sqrt(var + 1e-5) + bias; all [T, C], in full precision."""
        values = x.values.astype(self.real)
        factor = scale * lax.rsqrt(var + EPSILON)
        values = (values - self.per_channel(mean, values)) * self.per_channel(factor, values)
        return x.with_values((values + self.per_channel(bias, values)).astype(self.dtype))

    def layer_norm(self, x: Activations, scale_TC: Array, bias_TC: Array) -> Activations:
        """Each example normalised over all its values, then a scale and a bias for each channel."""
        group = self.side_by_side(x.values)
        values = x.values.astype(self.real)
        apart = values.reshape(*values.shape[:-1], group, -1)
        axes = (*range(2, apart.ndim - 2), apart.ndim - 1)
        apart = apart - apart.mean(axes, keepdims=True)
        apart = apart * lax.rsqrt(jnp.square(apart).mean(axes, keepdims=True) + EPSILON)
        values = apart.reshape(values.shape)
        values = values * self.per_channel(scale_TC, values) + self.per_channel(bias_TC, values)
        return x.with_values(values.astype(self.dtype))

    def relu(self, x: Activations) -> Activations:
        """max(x, 0)."""
        return x.with_values(jax.nn.relu(x.values))

    def add(self, x: Activations, y: Activations) -> Activations:
        """x + y."""
        taint = x.taint
        if x.taint is not None and y.taint is not None:
            taint = (*x.taint, *(one for one in y.taint if all(one is not other for other in x.taint)))
        return x.with_values(x.values + y.values, taint=taint, clean=x.clean and y.clean, seen=x.seen and y.seen)

    def shared(self, x: Activations) -> Activations:
        """x, of which more than one layer makes use."""
        return x

    def pool(self, x: Activations) -> Activations:
        """Means over height and width, in full precision: [K, B, H, W, G C] -> [T, B, C]."""
        return self.by_trial(x, x.values.astype(self.real).mean((2, 3)))

    def flatten(self, x: Activations) -> Activations:
        """[K, B, H, W, G C] -> [T, B, H W C]."""
        flat = self.by_trial(x, x.values.reshape(*x.values.shape[:2], -1, x.values.shape[-1]))
        return flat.with_values(flat.values.reshape(*flat.values.shape[:2], -1))

    def by_trial(self, x: Activations, values: Array) -> Activations:
        """[K, B, .., G C] -> [T, B, .., C]."""
        group = self.side_by_side(values)
        if group > 1:
            apart = values.reshape(*values.shape[:-1], group, -1)
            apart = jnp.moveaxis(apart, -2, 1)
            values = apart.reshape(self.trials, *apart.shape[2:])
        return x.with_values(values)

    def leave(self, x: Activations | Array) -> Array:
        """Values by trial, [T, B, .., C], in full precision; what is no `Activations` is so already."""
        values = self.by_trial(x, x.values).values if isinstance(x, Activations) else x
        return values.astype(self.real)


def one_convolution(images_BHWC: Array, kernel_OhwI: Array, stride: int, pad: int) -> Array:
    """XLA's own convolution, [B, H', W', O]."""
    numbers = ("NHWC", "OHWI", "NHWC")
    return lax.conv_general_dilated(
        images_BHWC, kernel_OhwI, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=numbers
    )


def dtypes(compute_dtype: str) -> tuple[jnp.dtype, jnp.dtype]:
    """The type to compute in, and that of parameters, statistics and logits."""
    if compute_dtype != "float64":
        return jnp.dtype(compute_dtype), jnp.dtype("float32")
    if jax.dtypes.canonicalize_dtype("float64") != "float64":  # else JAX would go on in float32
        raise InputError("compute_dtype is 'float64'; it needs JAX's jax_enable_x64 to be on.")
    return jnp.dtype("float64"), jnp.dtype("float64")
