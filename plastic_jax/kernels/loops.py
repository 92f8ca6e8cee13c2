"""Convolutions in JAX's own operations that are fast inside a CPU's loops: `mended` ones, and `products`.

XLA's CPU backend rewrites convolutions into the one layout that its fast kernel takes, but only in
the program's entry computation (jax-ml/jax#12868). The forward convolution of an NHWC network is
born in that layout; the two convolutions that JAX derives for its gradients are not, and inside
`lax.scan`, `lax.while_loop` or `lax.map` they fall back to a naive loop. `mended` writes both
gradients as convolutions in the fast layout themselves.

`products` is `mended` with matrix products where they were measured to pay (two CPU cores, AVX-512, one device a
core, inside a loop, 2026-11-22), a few images at a time, so that what is laid out stays in the cache:

- the gradient of every kernel: 1.2 times as fast as the mended one with 8 channels, 1.6 to 2.4 times with 16 to 64. In
  a whole network it also spares the transposed copies, which XLA fuses with all that comes before;
- a 3x3 convolution that sums over at most 8 channels (a stem, a narrow net's first module in both directions), four
  pixels at a time: 1.5 to 5 times as fast, although half of the products are with zeros. With 16 channels it is as
  fast as XLA's own, with more slower.

Tried and left, since slower or no faster: im2col, three products over rows, one product with nine taps beside each
other, the strided input gradients as products, barriers between layers, other library backends of XLA's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_CANONICAL = ("NHWC", "HWIO", "NHWC")
Pair = tuple[int, int]
_FEW = 8  # channels up to which a convolution pays as a product over _PIXELS pixels at a time
_PIXELS = 4
_SLICE = 8  # images whose kernel gradient is computed at a time


def convolution(
    images_BHWC: Array,
    kernel_HWIO: Array,
    strides: tuple[int, ...],
    pads: tuple[Pair, ...],
    convolve: Callable[[Array, Array, tuple[int, ...], tuple[Pair, ...], Any], Array],
) -> Array:
    """A convolution of NHWC images by a function with gradients of its own: [B, H', W', O].

    Reverse mode only (`jax.grad`, `jax.vjp`, and `jax.jvp` *of* a gradient); a plain `jax.jvp`
    through it raises, as for every `jax.custom_vjp`.

    Args:
      images_BHWC: [B, H, W, C].
      kernel_HWIO: [h, w, C, O].
      strides: of height and width.
      pads: (low, high) of height and width.
      convolve: gets images, the kernel without the taps that see nothing but padding, strides, pads and precision.
    """
    images_BHWC, kernel_HWIO = vary_alike(images_BHWC, kernel_HWIO)
    kernel_HWIO, pads = without_unused_taps(images_BHWC, kernel_HWIO, strides, pads)
    return convolve(images_BHWC, kernel_HWIO, strides, pads, None)


def direct(
    images_BHWC: Array,
    kernel_HWIO: Array,
    strides: tuple[int, ...],
    pads: tuple[Pair, ...],
    precision: Any,
    formulation: str,
) -> Array:
    """The convolution alone, as JAX differentiates it: forwards too, but not fast backwards."""
    if formulation == "products" and _same(kernel_HWIO, strides, pads) and _banded_pays(images_BHWC):
        return _sliced_banded(images_BHWC, kernel_HWIO, precision)
    return _canonical(images_BHWC, kernel_HWIO, pads, strides=strides, precision=precision)


differentiable: Any = partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))(direct)
"""That, with its gradients; reverse mode only."""


def _forward(
    images_BHWC: Array,
    kernel_HWIO: Array,
    strides: tuple[int, ...],
    pads: tuple[Pair, ...],
    precision: Any,
    formulation: str,
) -> tuple[Array, tuple[Array, Array]]:
    # Not the custom_vjp itself: a gradient's own ingredients must be differentiable forwards.
    out_BHWO = direct(images_BHWC, kernel_HWIO, strides, pads, precision, formulation)
    return out_BHWO, (images_BHWC, kernel_HWIO)


def _backward(
    strides: tuple[int, ...],
    pads: tuple[Pair, ...],
    precision: Any,
    formulation: str,
    saved: tuple[Array, Array],
    gradient_BHWO: Array,
) -> tuple[Array, Array]:
    images_BHWC, kernel_HWIO = saved
    sizes, taps, outputs = images_BHWC.shape[1:3], kernel_HWIO.shape[:2], gradient_BHWO.shape[1:3]
    axes = tuple(zip(sizes, taps, outputs, strides, pads, strict=True))

    # dL/dx: the output's gradient, spread out by the stride, convolved with the kernel turned
    # round and with its two channel axes exchanged.
    turned_HWOI = kernel_HWIO[::-1, ::-1].transpose(0, 1, 3, 2)
    if formulation == "products" and _same(kernel_HWIO, strides, pads) and _banded_pays(gradient_BHWO):
        image_gradient_BHWC = _sliced_banded(gradient_BHWO, turned_HWOI, precision)
    else:
        image_gradient_BHWC = _canonical(
            gradient_BHWO,
            turned_HWOI,
            tuple((tap - 1 - low, size - 1 + low - (out - 1) * step) for size, tap, out, step, (low, _) in axes),
            image_dilation=strides,
            precision=precision,
        )
    if formulation == "products":
        return image_gradient_BHWC, _sliced_kernel_gradient(
            images_BHWC, gradient_BHWO, kernel_HWIO, strides, pads, precision
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


differentiable.defvjp(_forward, _backward)


def _same(kernel_HWIO: Array, strides: Sequence[int], pads: Sequence[Pair]) -> bool:
    """Whether it is a 3x3 convolution that keeps the image's size."""
    return kernel_HWIO.shape[:2] == (3, 3) and set(strides) == {1} and set(pads) == {(1, 1)}


def _banded_pays(images_BHWC: Array) -> bool:
    return images_BHWC.shape[3] <= _FEW and images_BHWC.shape[2] % _PIXELS == 0


def _banded(images_BHWC: Array, kernel_HWIO: Array, precision: Any) -> Array:
    """A 3x3 convolution, stride 1, padding 1, as one product of windows of six pixels with a banded matrix.

    Each window [6 C] of a row gives four neighbouring outputs for each of the kernel's three rows, [3 x 4 O]; the
    three are added up, each from its own image row. Wide products are worth the zeros of the band.
    """
    count, height, width, channels = images_BHWC.shape
    outputs = kernel_HWIO.shape[-1]
    blocks, window, run = width // _PIXELS, _PIXELS + 2, _PIXELS * channels
    padded = jnp.pad(images_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    first = padded[:, :, :width].reshape(count, height + 2, blocks, run)
    last_two = padded[:, :, 2:].reshape(count, height + 2, blocks, run)[..., run - 2 * channels :]
    windows = jnp.concatenate([first, last_two], -1).reshape(-1, window * channels)
    taps_WIHO = kernel_HWIO.transpose(1, 2, 0, 3)
    pixels = [jnp.pad(taps_WIHO, ((k, _PIXELS - 1 - k), (0, 0), (0, 0), (0, 0))) for k in range(_PIXELS)]
    band = jnp.stack(pixels, 3).reshape(window * channels, 3 * _PIXELS * outputs)
    rows = jnp.matmul(windows, band, precision=precision).reshape(count, height + 2, blocks, 3, _PIXELS * outputs)
    summed = rows[:, :height, :, 0] + rows[:, 1 : height + 1, :, 1] + rows[:, 2:, :, 2]
    return summed.reshape(count, height, width, outputs)


def _slices(array: Array) -> tuple[Array, Array]:
    """A batch as slices of `_SLICE` images, stacked, and the rest of it."""
    whole = array.shape[0] - array.shape[0] % _SLICE
    return array[:whole].reshape(whole // _SLICE, _SLICE, *array.shape[1:]), array[whole:]


def _sliced_banded(images_BHWC: Array, kernel_HWIO: Array, precision: Any) -> Array:
    """`_banded` over slices of the batch."""
    slices, rest = _slices(images_BHWC)
    out = lax.map(lambda images: _banded(images, kernel_HWIO, precision), slices)
    whole = out.reshape(-1, *out.shape[2:])
    return jnp.concatenate([whole, _banded(rest, kernel_HWIO, precision)]) if rest.shape[0] else whole


def _sliced_kernel_gradient(
    images_BHWC: Array,
    gradient_BHWO: Array,
    kernel_HWIO: Array,
    strides: Sequence[int],
    pads: Sequence[Pair],
    precision: Any,
) -> Array:
    """The kernel's gradient [h, w, C, O], summed over slices of the batch, in float32 at least, and rounded once."""

    def one(images: Array, gradient: Array) -> Array:
        if _same(kernel_HWIO, strides, pads):
            return _kernel_gradient(images, gradient, precision)
        return _any_kernel_gradient(images, gradient, kernel_HWIO.shape[:2], strides, pads, precision)

    (images, more_images), (gradient, more_gradient) = _slices(images_BHWC), _slices(gradient_BHWO)
    rest = one(more_images, more_gradient)
    total = lax.scan(lambda total, slices: (total + one(*slices), None), rest, (images, gradient))[0]
    return total.astype(kernel_HWIO.dtype)


def _product(rows: Array, columns: Array, precision: Any) -> Array:
    """A matrix product that keeps the float32 sums of bfloat16 operands."""
    sums = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.matmul(rows, columns, precision=precision, preferred_element_type=sums)


def _any_kernel_gradient(
    images_BHWC: Array,
    gradient_BHWO: Array,
    taps: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[Pair],
    precision: Any,
) -> Array:
    """One product of what each tap sees, [n, h w C], with the gradient, [n, O]."""
    channels, (rows, columns, outputs) = images_BHWC.shape[3], gradient_BHWO.shape[1:]
    padded = lax.pad(images_BHWC, jnp.zeros((), images_BHWC.dtype), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])

    def seen(i: int, j: int) -> Array:
        ends = i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1
        return padded[:, i : ends[0] : strides[0], j : ends[1] : strides[1]]

    images = jnp.concatenate([seen(i, j) for i in range(taps[0]) for j in range(taps[1])], -1)
    flat = images.reshape(-1, images.shape[-1])
    product = _product(flat.T, gradient_BHWO.reshape(-1, outputs), precision)
    return product.reshape(*taps, channels, outputs)


def _kernel_gradient(images_BHWC: Array, gradient_BHWO: Array, precision: Any) -> Array:
    """One product of the images, shifted by rows, [n, 3 C] with the gradient, shifted by columns, [n, 3 O].

    dL/dw[i, j] is the sum over h and u of x[h + i - 1, u] g[h, u - j + 1].
    """
    _, height, width, channels = images_BHWC.shape
    outputs = gradient_BHWO.shape[-1]
    padded = jnp.pad(images_BHWC, ((0, 0), (1, 1), (0, 0), (0, 0)))
    images = jnp.concatenate([padded[:, i : i + height] for i in range(3)], -1).reshape(-1, 3 * channels)
    padded = jnp.pad(gradient_BHWO, ((0, 0), (0, 0), (1, 1), (0, 0)))
    gradient = jnp.concatenate([padded[:, :, 2 - j : 2 - j + width] for j in range(3)], -1).reshape(-1, 3 * outputs)
    product = _product(images.T, gradient, precision)
    return product.reshape(3, channels, 3, outputs).transpose(0, 2, 1, 3)


def _canonical(
    images: Array,
    kernel: Array,
    pads: Sequence[Pair],
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


def without_unused_taps(
    images_BHWC: Array, kernel_HWIO: Array, strides: Sequence[int], pads: Sequence[Pair]
) -> tuple[Array, tuple[Pair, ...]]:
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


def vary_alike(*arrays: Array) -> list[Array]:
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
