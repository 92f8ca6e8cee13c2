"""Blocks of trials for accelerators: K dense convolutions, and one operation for all trials of everything else.

A narrow network's step is bound by the number of kernels that it launches, not by their work, so that the trials of a
block share launches. Within a group of G trials a convolution is block-diagonal, and 0 * NaN is NaN: so no non-finite
value may enter one, forwards or backwards. They are taken out, and the trial that had them is marked by its own
statistics, loss and gradients (contract 6). Forwards, its `taint` is 0 times what tells of all values that were looked
at: in training a norm's statistics, scale and bias, else the values themselves. It is NaN if anything was not finite,
and spoils the trial's own features again where the network leaves the channels. Backwards, the gradients of scales and
biases are sums over the gradients that were taken out, and are not finite themselves; a product that overflows between
two such sums shows in the parameters, one step later.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from plastic_jax.kernels.mapped import EPSILON, Activations, Mapped, one_convolution


class Packed(Mapped):
    """T = K G trials at a time."""

    batched: ClassVar[bool] = True

    def enter(self, images: Array) -> Activations:
        """The images are turned round while they are bytes; nothing else is."""
        groups, group = self.trials // self.group, self.group
        if group == 1:
            return super().enter(images)
        if images.ndim == 4:
            values = jnp.broadcast_to(images[None, ..., None, :], (groups, *images.shape[:3], group, images.shape[3]))
        else:
            values = jnp.moveaxis(images.reshape(groups, group, *images.shape[1:]), 1, 4)
        values = values.reshape(*values.shape[:4], -1)
        return Activations(self.normalised_images(values), self, taint=())

    def convolution(self, x: Activations, kernel_TOhwI: Array, bias_TO: Array | None, stride: int) -> Activations:
        """As `Mapped`; its values are new, so that what follows has to look whether they are finite."""
        x = super().convolution(self._cleaned(x), kernel_TOhwI, bias_TO, stride)
        return x.with_values(x.values, clean=x.taint is None, seen=False)

    def convolve(self, x: Activations, kernel_TOhwI: Array, stride: int, pad: int) -> Array:
        """K convolutions, each block-diagonal in its G trials."""
        kernels = kernel_TOhwI if self.group == 1 else _block_diagonal(kernel_TOhwI, self.group)
        each = [
            one_convolution(v, kernel, stride, pad) for v, kernel in zip(list(x.values), list(kernels), strict=True)
        ]
        return jnp.stack(each) if self.group == 1 else _finite_gradient(jnp.stack(each))

    def product(self, values_TBD: Array, kernel_TDO: Array) -> Array:
        """A batched product."""
        return jnp.matmul(values_TBD, kernel_TDO)

    def batch_norm(self, x: Activations, scale_TC: Array, bias_TC: Array) -> tuple[Activations, Array, Array]:
        """As `Mapped`, but of images in one pass for the sums forwards and one for those backwards."""
        if x.values.ndim == 3:  # few values; and of the bias before it Adam sees nothing but the rounding
            return super().batch_norm(x, scale_TC, bias_TC)
        per = partial(self.per_channel, like=x.values)
        found: Any = _batch_norm(x.values, per(scale_TC), per(bias_TC), self.dtype, self.real)
        values, mean, var = found
        mean, var = self.per_trial(mean), self.per_trial(var)
        # What comes out of the norm, and what it is multiplied with, may be too large where these are not: no standard
        # value is above the root of their number.
        most = jnp.abs(scale_TC) * (x.values.size / mean.size) ** 0.5 + jnp.abs(bias_TC)
        factor = scale_TC * lax.rsqrt(var + EPSILON)
        return self._tainted(x.with_values(values), mean, var, most, factor), mean, var

    def relu(self, x: Activations) -> Activations:
        """As `Mapped`; what is not finite becomes 0 where it could reach another trial."""
        finite = not x.clean
        if not (x.clean or x.seen):
            x = self._looked_at(x)
        if x.values.shape[0] == 1:
            return x.with_values(_relu(x.values, finite), clean=True)
        return x.with_values(_rectified(x.values, finite), clean=True)

    def by_trial(self, x: Activations, values: Array) -> Activations:
        """As `Mapped`; here the trials part, and a trial's taint spoils its own values again."""
        x = super().by_trial(x, values)
        if not x.taint:
            return x.with_values(x.values, taint=None, clean=True)
        taint = jnp.concatenate(x.taint, axis=1).sum(1)
        taint = taint.astype(x.values.dtype).reshape(-1, *(1,) * (x.values.ndim - 1))
        return x.with_values(x.values + taint, taint=None, clean=True)

    def _cleaned(self, x: Activations) -> Activations:
        """Without what is not finite, where it could reach another trial."""
        if x.clean:
            return x
        x = x if x.seen else self._looked_at(x)
        return x.with_values(_finite(x.values), clean=True)

    def _looked_at(self, x: Activations) -> Activations:
        """Remembers in one pass which trials have values that are not finite."""
        axes = tuple(range(1, x.values.ndim - 1))
        return self._tainted(x, self.per_trial((0 * x.values).sum(axes, dtype=self.real)))

    def _tainted(self, x: Activations, *values_TC: Array) -> Activations:
        """Remembers the trials that have anything non-finite in these values, which tell of all those of x."""
        if x.taint is None:
            return x
        total = sum((0 * lax.stop_gradient(v) for v in values_TC), start=jnp.zeros((), self.real))
        return x.with_values(x.values, taint=(*x.taint, total), clean=False, seen=True)


def _block_diagonal(kernel_TOhwI: Array, group: int) -> Array:
    """[T, O, h, w, I] -> [K, G O, h, w, G I]; zeros are chosen, not multiplied: a kernel may hold infinities."""
    trials, outputs, height, width, inputs = kernel_TOhwI.shape
    apart = kernel_TOhwI.reshape(trials // group, group, outputs, height, width, 1, inputs)
    own = jnp.eye(group, dtype=bool).reshape(1, group, 1, 1, 1, group, 1)
    full = jnp.where(own, apart, jnp.zeros((), apart.dtype))
    return full.reshape(trials // group, group * outputs, height, width, group * inputs)


def _only_finite(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, jnp.zeros((), values.dtype))


@jax.custom_vjp
def _finite(values: Array) -> Array:
    """Non-finite values become 0, the gradient stays."""
    return _only_finite(values)


_finite.defvjp(lambda values: (_only_finite(values), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def _finite_gradient(values: Array) -> Array:
    """The values stay, non-finite values of the gradient become 0."""
    return values


_finite_gradient.defvjp(lambda values: (values, None), lambda _, gradient: (_only_finite(gradient),))


def _rectified(values: Array, finite: bool) -> Array:
    """max(x, 0); `finite`: 0 for NaN and infinity too."""
    if not finite:
        return jax.nn.relu(values)
    return jnp.where((values > 0) & (values < jnp.inf), values, jnp.zeros((), values.dtype))


_relu = jax.custom_vjp(_rectified, nondiff_argnums=(1,))
"""That; its gradient asks for nothing but its output, which one group keeps for the next layer anyway.

Of several groups only the parts are kept, each for its own convolution, and a mask is smaller than a second copy.
"""


def _relu_forward(values: Array, finite: bool) -> tuple[Array, Array]:
    out = _rectified(values, finite)
    return out, out


def _relu_backward(_: bool, out: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(out > 0, gradient, jnp.zeros((), gradient.dtype)),)


_relu.defvjp(_relu_forward, _relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(values: Array, scale: Array, bias: Array, dtype: Any, real: Any) -> Any:
    """Normalised values, mean and biased variance."""
    return _batch_norm_forward(values, scale, bias, dtype, real)[0]


def _batch_norm_forward(values: Array, scale: Array, bias: Array, dtype: Any, real: Any) -> Any:
    axes = tuple(range(1, values.ndim - 1))
    # Sums of squares would cancel far from zero: so they are of differences from one of the values.
    shift = values[:, :1, :1, :1].astype(real)
    away = values.astype(real) - shift
    n = values.size // scale.size
    first, second = (total / n for total in _sums(away, jnp.square(away), axes))
    mean, var = shift + first, jnp.maximum(second - jnp.square(first), 0)
    inverse = lax.rsqrt(var + EPSILON)
    out = (values.astype(real) - mean) * (scale * inverse) + bias
    return (out.astype(dtype), mean, var), (values, scale, mean, inverse)


def _batch_norm_backward(dtype: Any, real: Any, saved: Any, gradients: Any) -> Any:
    values, scale, mean, inverse = saved
    gradient = gradients[0].astype(real)  # the running statistics are not differentiated
    axes = tuple(range(1, values.ndim - 1))
    standard = (values.astype(real) - mean) * inverse
    of_bias, of_scale = _sums(gradient, gradient * standard, axes)
    n = values.size // scale.size
    factor = scale * inverse
    of_values = (gradient - of_bias / n - standard * (of_scale / n)) * factor
    # What overflows in this product is taken out further back: it shows here.
    return of_values.astype(values.dtype), of_scale + 0 * (of_scale * factor) + 0 * (of_bias * factor), of_bias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _sums(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Both sums over `axes` in one reduction, which XLA then splits into two launches instead of three."""
    zero = jnp.zeros((), a.dtype)
    sums = lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return tuple(jnp.expand_dims(total, axes) for total in sums)
