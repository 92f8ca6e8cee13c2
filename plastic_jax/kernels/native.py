"""A CPU's operations in C++: norm, ReLU and convolution as one unit, linear layers, and Adam's update.

What can be computed in one go waits until it is known what comes after it: a convolution for its norm, a norm for its
ReLU, a normed image for the convolution that takes it in, so that neither the norm's output nor its gradient is ever
written to memory. Only in training with BatchNorm does any of this happen; all else is computed at once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from plastic_jax.kernels import dense, loops, units
from plastic_jax.kernels.mapped import EPSILON, Activations, Mapped


class Native(Mapped):
    """One trial at a time."""

    adam: ClassVar[Any] = staticmethod(dense.adam)

    def convolution(self, x: Activations, kernel_TOhwI: Array, bias_TO: Array | None, stride: int) -> Activations:
        """As `Mapped`; waits for a norm's wish for its statistics."""
        if bias_TO is not None or self.compute_dtype == "bfloat16":
            return super().convolution(x, kernel_TOhwI, bias_TO, stride)
        return _Convolved(self, x, kernel_TOhwI[0].transpose(1, 2, 3, 0).astype(self.dtype), stride)

    def convolve(self, x: Activations, kernel_TOhwI: Array, stride: int, pad: int) -> Array:
        """A convolution alone."""
        return _convolve(x, kernel_TOhwI[0].transpose(1, 2, 3, 0), stride)[None]

    def product(self, values_TBD: Array, kernel_TDO: Array) -> Array:
        """The hidden layers' are native; the head, of few columns, is left to XLA."""
        if kernel_TDO.shape[-1] < 16:
            return super().product(values_TBD, kernel_TDO)
        return dense.product(values_TBD[0], kernel_TDO[0])[None]

    def batch_norm(self, x: Activations, scale_TC: Array, bias_TC: Array) -> tuple[Activations, Array, Array]:
        """As `Mapped`; after a convolution, yet to be applied."""
        if not isinstance(x, _Convolved):
            return super().batch_norm(x, scale_TC, bias_TC)
        out, (mean, var) = x.unit()
        factor = scale_TC[0] * lax.rsqrt(var + EPSILON)
        return _Normed(self, out, jnp.stack([mean, factor, bias_TC[0]])), mean[None], var[None]

    def relu(self, x: Activations) -> Activations:
        """As `Mapped`; of what a norm or a sum has yet to give, part of it."""
        if isinstance(x, _Normed) and not x.rectified:
            return _Normed(self, x.out, x.norm_3C, rectified=True)
        if isinstance(x, _Sum):
            return Activations(x.rectified(), self)
        return super().relu(x)

    def add(self, x: Activations, y: Activations) -> Activations:
        """As `Mapped`; waits for a ReLU."""
        if isinstance(x, _Normed) and not x.rectified:
            return _Sum(self, x, y)
        return super().add(x, y)

    def shared(self, x: Activations) -> Activations:
        """Computed now, once."""
        return Activations(x.values, self)


class _Waiting(Activations):
    """Activations whose `values` are computed when they are asked for."""

    taint, clean, seen = None, True, True

    def with_values(self, values: Array, **_: Any) -> Activations:
        """These values, at hand."""
        return Activations(values, self.kernels)


class _Convolved(_Waiting):
    def __init__(self, kernels: Native, inputs: Activations, kernel_HWIO: Array, stride: int):
        self.kernels, self.inputs, self.kernel_HWIO, self.stride = kernels, inputs, kernel_HWIO, stride

    @property
    def values(self) -> Array:
        return _convolve(self.inputs, self.kernel_HWIO, self.stride)[None]

    @property
    def shape(self) -> tuple[int, ...]:
        count, *size, _ = self.inputs.shape
        return (count, *((side - 1) // self.stride + 1 for side in size), self.kernel_HWIO.shape[-1])

    def unit(self) -> tuple[Array, Array]:
        """The convolution, and its statistics [2, C]."""
        x = self.inputs
        if isinstance(x, _Normed) and x.rectified:
            return units.unit(x.out, self.kernel_HWIO, x.norm_3C, self.stride)
        return units.unit(x.values[0], self.kernel_HWIO, None, self.stride)


class _Normed(_Waiting):
    """`norm_3C`: mean, factor and bias, yet to be applied; `rectified`: a ReLU too."""

    def __init__(self, kernels: Native, out: Array, norm_3C: Array, rectified: bool = False):
        self.kernels, self.out, self.norm_3C, self.rectified = kernels, out, norm_3C, rectified

    @property
    def values(self) -> Array:
        if self.rectified:
            return units.joined(self.out, self.norm_3C, None, None)[None]
        return units.normalised(self.out, self.norm_3C)[None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out.shape


class _Sum(_Waiting):
    def __init__(self, kernels: Native, first: _Normed, second: Activations):
        self.kernels, self.first, self.second = kernels, first, second

    @property
    def values(self) -> Array:
        return self.first.values + self.second.values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def rectified(self) -> Array:
        """ReLU of the sum."""
        first, second = self.first, self.second
        if isinstance(second, _Normed) and not second.rectified:
            return units.joined(first.out, first.norm_3C, second.out, second.norm_3C)[None]
        return units.joined(first.out, first.norm_3C, second.values[0], None)[None]


def _convolve(x: Activations, kernel_HWIO: Array, stride: int) -> Array:
    pad = (kernel_HWIO.shape[0] - 1) // 2
    return loops.convolution(x.values[0], kernel_HWIO, (stride, stride), ((pad, pad), (pad, pad)), units.convolve)
