"""A CPU's convolutions in JAX's own operations (`loops.py`): their gradients are fast inside XLA's loops."""

from __future__ import annotations

from typing import Any

from jax import Array

from plastic_jax.kernels import loops
from plastic_jax.kernels.mapped import Activations, Mapped


class Products(Mapped):
    """One trial at a time."""

    def convolve(self, x: Activations, kernel_TOhwI: Array, stride: int, pad: int) -> Array:
        """A product of matrices where that pays."""
        return product_convolution(x.values[0], kernel_TOhwI[0].transpose(1, 2, 3, 0), stride, pad)[None]


def product_convolution(images_BHWC: Array, kernel_HWIO: Array, stride: int, pad: int) -> Array:
    """[B, H', W', O]."""
    return loops.convolution(images_BHWC, kernel_HWIO, (stride, stride), ((pad, pad), (pad, pad)), _convolve)


def _convolve(*convolution: Any) -> Array:
    return loops.differentiable(*convolution, "products")
