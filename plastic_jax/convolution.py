"""Two formulations of one convolution: XLA's own, and one whose backward pass is fast inside loops.

XLA's CPU backend rewrites convolutions into the one layout that its fast kernel takes, but only in
the program's entry computation (jax-ml/jax#12868). The forward convolution of an NHWC network is
born in that layout; the two convolutions that JAX derives for its gradients are not, and inside
`lax.scan`, `lax.while_loop` or `lax.map` they fall back to a naive loop. `mended` writes both
gradients as convolutions in the fast layout themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from plastic_jax.errors import InputError

FORMULATIONS = ("plain", "mended")

_CANONICAL = ("NHWC", "HWIO", "NHWC")
_Pair = tuple[int, int]


def conv(name: str) -> Callable[..., Array]:
    """The convolution of that formulation, for `flax.linen.Conv(conv_general_dilated=...)`.

    Args:
      name: one of `FORMULATIONS`. `plain` is `lax.conv_general_dilated`; `mended` is
        `mended_convolution`, equal to it value for value and gradient for gradient.

    Raises:
      InputError: for another name.
    """
    if name == "plain":
        return lax.conv_general_dilated
    if name == "mended":
        return mended_convolution
    raise InputError(f"convolution is {name!r}; it must be one of {', '.join(FORMULATIONS)}.")


def mended_convolution(
    images_BHWC: Array,
    kernel_HWIO: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[_Pair],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`lax.conv_general_dilated` for NHWC images, with gradients in XLA's fast CPU layout.

    Reverse mode only (`jax.grad`, `jax.vjp`, and `jax.jvp` *of* a gradient); a plain `jax.jvp`
    through it raises, as for every `jax.custom_vjp`.

    Args:
      images_BHWC: [B, H, W, C].
      kernel_HWIO: [h, w, C, O].
      window_strides: two strides.
      padding: `'SAME'`, `'VALID'`, or two (low, high) pairs.
      lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
      preferred_element_type: only the values of an ordinary NHWC/HWIO convolution.
      precision: as for `lax.conv_general_dilated`, used for the gradients too.

    Returns:
      [B, H', W', O] with H' = (H + low + high - h) // stride + 1.

    Raises:
      ValueError: for a dilated, grouped or otherwise laid out convolution.
    """
    numbers = lax.conv_dimension_numbers(images_BHWC.shape, kernel_HWIO.shape, _CANONICAL)
    ordinary = (
        images_BHWC.ndim == 4
        and set(lhs_dilation or (1,)) == {1}
        and set(rhs_dilation or (1,)) == {1}
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and lax.conv_dimension_numbers(images_BHWC.shape, kernel_HWIO.shape, dimension_numbers) == numbers
    )
    if not ordinary:
        raise ValueError(
            "the mended convolution takes NHWC images and an HWIO kernel, without dilation, groups "
            "or preferred_element_type; use the plain one."
        )
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images_BHWC.shape[1:3], kernel_HWIO.shape[:2], strides, padding)
    images_BHWC, kernel_HWIO = _vary_alike(images_BHWC, kernel_HWIO)
    kernel_HWIO, pads = _without_unused_taps(images_BHWC, kernel_HWIO, strides, padding)
    return _mended(images_BHWC, kernel_HWIO, strides, pads, precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _mended(
    images_BHWC: Array,
    kernel_HWIO: Array,
    strides: tuple[int, ...],
    pads: tuple[_Pair, ...],
    precision: Any,
) -> Array:
    return _canonical(images_BHWC, kernel_HWIO, pads, strides=strides, precision=precision)


def _forward(
    images_BHWC: Array,
    kernel_HWIO: Array,
    strides: tuple[int, ...],
    pads: tuple[_Pair, ...],
    precision: Any,
) -> tuple[Array, tuple[Array, Array]]:
    # Not `_mended`: a gradient's own ingredients must be differentiable forwards.
    out_BHWO = _canonical(images_BHWC, kernel_HWIO, pads, strides=strides, precision=precision)
    return out_BHWO, (images_BHWC, kernel_HWIO)


def _backward(
    strides: tuple[int, ...],
    pads: tuple[_Pair, ...],
    precision: Any,
    saved: tuple[Array, Array],
    gradient_BHWO: Array,
) -> tuple[Array, Array]:
    images_BHWC, kernel_HWIO = saved
    sizes, taps, outputs = images_BHWC.shape[1:3], kernel_HWIO.shape[:2], gradient_BHWO.shape[1:3]
    axes = tuple(zip(sizes, taps, outputs, strides, pads, strict=True))

    # dL/dx: the output's gradient, spread out by the stride, convolved with the kernel turned
    # round and with its two channel axes exchanged.
    turned_HWOI = kernel_HWIO[::-1, ::-1].transpose(0, 1, 3, 2)
    image_gradient_BHWC = _canonical(
        gradient_BHWO,
        turned_HWOI,
        tuple((tap - 1 - low, size - 1 + low - (output - 1) * stride) for size, tap, output, stride, (low, _) in axes),
        image_dilation=strides,
        precision=precision,
    )

    # dL/dw: each input channel is an image whose channels are the examples, and the output's
    # gradient, spread out by the stride, is the kernel.
    images_CHWB = images_BHWC.transpose(3, 1, 2, 0)
    gradient_HWBO = gradient_BHWO.transpose(1, 2, 0, 3)
    kernel_gradient_IHWO = _canonical(
        images_CHWB,
        gradient_HWBO,
        tuple((low, tap + (output - 1) * stride - size - low) for size, tap, output, stride, (low, _) in axes),
        kernel_dilation=strides,
        precision=precision,
    )
    return image_gradient_BHWC, kernel_gradient_IHWO.transpose(1, 2, 0, 3)


_mended.defvjp(_forward, _backward)


def _canonical(
    images: Array,
    kernel: Array,
    pads: Sequence[_Pair],
    *,
    strides: Sequence[int] = (1, 1),
    image_dilation: Sequence[int] = (1, 1),
    kernel_dilation: Sequence[int] = (1, 1),
    precision: Any,
) -> Array:
    """A convolution that XLA leaves in the layout NHWC, HWIO -> NHWC.

    Where a kernel has more taps than an image has pixels, XLA exchanges the two and so leaves the
    layout; an image that is padded beforehand, behind a barrier, is never the smaller one.
    """
    if math.prod(kernel.shape[:2]) > math.prod(images.shape[1:3]):
        inner = [(low, high, step - 1) for (low, high), step in zip(pads, image_dilation, strict=True)]
        zero = jnp.zeros((), images.dtype)
        images = lax.optimization_barrier(lax.pad(images, zero, [(0, 0, 0), *inner, (0, 0, 0)]))
        pads, image_dilation = ((0, 0), (0, 0)), (1, 1)
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        pads,
        lhs_dilation=image_dilation,
        rhs_dilation=kernel_dilation,
        dimension_numbers=_CANONICAL,
        precision=precision,
    )


def _without_unused_taps(
    images_BHWC: Array, kernel_HWIO: Array, strides: Sequence[int], pads: Sequence[_Pair]
) -> tuple[Array, tuple[_Pair, ...]]:
    """Cuts off the taps that see nothing but padding, as all but one of nine do on a 1x1 image."""
    slices, kept = [], []
    for axis, ((low, high), stride) in enumerate(zip(pads, strides, strict=True)):
        size, taps = images_BHWC.shape[1 + axis], kernel_HWIO.shape[axis]
        last_output = (size + low + high - taps) // stride
        end = min(taps, size + low)
        first = min(max(0, low - last_output * stride), end - 1)
        slices.append(slice(first, end))
        kept.append((low - first, high - (taps - end)))
    return kernel_HWIO[tuple(slices)], tuple(kept)


def _vary_alike(*arrays: Array) -> list[Array]:
    """Inside `jax.shard_map`: lets all arrays vary over the mesh axes that any of them varies over.

    JAX does so by itself for its own operations, but not for a `custom_vjp`. It makes the gradient
    of an array that all shards share the sum over the shards.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(sorted(union - axes)), to="varying") if union - axes else array
        for array, axes in zip(arrays, varying, strict=True)
    ]
