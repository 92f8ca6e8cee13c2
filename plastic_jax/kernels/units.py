"""A unit of norm, ReLU and convolution in one go: the native kernels' convolutions.

They call `cc/native_convolution.cc`, compiled for the machine at hand, for 3x3 and 1x1 convolutions in float32 and
float64; others are products of matrices (`loops.py`). One core does a narrow net's convolutions at 100 to 180 GFLOP/s
there, in about half of the time of the products forwards and for images, and a third for kernels. With BatchNorm the
norms and ReLUs between them, their statistics and gradients are computed there too, image by image, while the image is
in the cache: a ResNet's training step with w = 8, batch 64 then takes 0.66 of the time, with w = 16, batch 128, 0.78
(two cores with AVX-512, one trial each, 2026-11-25).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from plastic_jax.kernels import library, loops


def convolve(
    images_BHWC: Array, kernel_HWIO: Array, strides: tuple[int, ...], pads: tuple[loops.Pair, ...], precision: Any
) -> Array:
    """A convolution alone, for `loops.convolution`."""
    if not library.fits(images_BHWC, kernel_HWIO, strides, pads):
        return loops.differentiable(images_BHWC, kernel_HWIO, strides, pads, precision, "products")
    images_BHWC, norm = loops.vary_alike(images_BHWC, _none(images_BHWC))
    out_BHWO, _ = _unit(images_BHWC, kernel_HWIO, norm, strides[0], False)
    return out_BHWO


def unit(images_BHWC: Array, kernel_HWIO: Array, norm_3C: Array | None, stride: int) -> tuple[Array, Array]:
    """A convolution of what comes out of a norm and a ReLU, and its own mean and variance: `native`, in one go.

    Then neither the norm's output nor its gradient are written to memory. What `library.fits` does not take is computed
    in JAX's own operations.

    Args:
      images_BHWC: [B, H, W, C].
      kernel_HWIO: 3x3 with padding 1, or 1x1 without.
      norm_3C: mean, factor and bias: the images are first made ReLU(factor (images - mean) + bias); None for not.
      stride: 1 or 2.

    Returns:
      [B, H', W', O], and its statistics [2, O]: by channel the mean and the biased variance.

    Raises:
      ValueError: for a norm of another shape or type than the images ask for.
    """
    _check(images_BHWC, norm_3C)
    images_BHWC, kernel_HWIO, norm = loops.vary_alike(
        images_BHWC, kernel_HWIO, _none(images_BHWC) if norm_3C is None else norm_3C
    )
    pad = (kernel_HWIO.shape[0] - 1) // 2
    kernel, pads = loops.without_unused_taps(images_BHWC, kernel_HWIO, (stride, stride), ((pad, pad), (pad, pad)))
    if library.fits(images_BHWC, kernel, (stride, stride), pads):
        return _unit(images_BHWC, kernel, norm, stride, True)
    return _written_out(images_BHWC, kernel_HWIO, norm, stride, True, lambda *x: loops.differentiable(*x, "products"))


def _check(images_BHWC: Array, norm_3C: Array | None) -> None:
    """The native calls read memory by these shapes and types."""
    if norm_3C is None:
        return
    if norm_3C.shape != (3, images_BHWC.shape[-1]) or norm_3C.dtype != images_BHWC.dtype:
        asked = f"{(3, images_BHWC.shape[-1])} of {images_BHWC.dtype}"
        raise ValueError(f"a norm is {norm_3C.shape} of {norm_3C.dtype}; for these images it must be {asked}.")


def _none(like: Array) -> Array:
    """No norm."""
    return jnp.zeros((0, like.shape[-1]), like.dtype)


def normalised(images_BHWC: Array, norm_3C: Array) -> Array:
    """factor (images - mean) + bias."""
    mean, factor, bias = norm_3C[:, None, None, None]
    return factor * (images_BHWC - mean) + bias


def _written_out(
    images_BHWC: Array, kernel_HWIO: Array, norm: Array, stride: int, statistics: bool, convolve: Any
) -> tuple[Array, Array]:
    """A unit in JAX's own operations."""
    if norm.shape[0]:
        images_BHWC = jax.nn.relu(normalised(images_BHWC, norm))
    strides, pad = (stride, stride), (kernel_HWIO.shape[0] - 1) // 2
    kernel_HWIO, pads = loops.without_unused_taps(images_BHWC, kernel_HWIO, strides, ((pad, pad), (pad, pad)))
    out_BHWO = convolve(images_BHWC, kernel_HWIO, strides, pads, None)
    if not statistics:
        return out_BHWO, _none(out_BHWO)
    mean = out_BHWO.mean((0, 1, 2), keepdims=True)
    return out_BHWO, jnp.concatenate([mean, jnp.square(out_BHWO - mean).mean((0, 1, 2), keepdims=True)])[:, 0, 0]


# Of the mended convolution, what can be differentiated forwards, and what then is fast backwards.
_JVP: Any = partial(loops.direct, formulation="mended")
_VJP: Any = lambda *x: loops.differentiable(*x, "mended")  # noqa: E731


# XLA knows no derivatives of the native calls: differentiated once more, they are the mended ones.
@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _unit_forward(
    images_BHWC: Array, kernel_HWIO: Array, norm: Array, stride: int, statistics: bool
) -> tuple[Array, Array]:
    count, *size, _ = images_BHWC.shape
    taps, *_, outputs = kernel_HWIO.shape
    shape = (count, *((side - 1) // stride + 1 for side in size), outputs)
    operands = images_BHWC, kernel_HWIO, norm
    shapes = shape, (2 * statistics, outputs)
    out, seen = library.call("forward", operands, shapes, stride=stride, pad=(taps - 1) // 2)
    return out, seen


@_unit_forward.defjvp
def _unit_forward_jvp(stride: int, statistics: bool, primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda *x: _written_out(*x, stride=stride, statistics=statistics, convolve=_JVP), primals, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _unit_backward(
    images_BHWC: Array, kernel_HWIO: Array, norm: Array, gradient_BHWO: Array, out_BHWO: Array, after: Array,
    stride: int, of_images: bool, of_kernel: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of images and kernel, and [2, C] sums for that of the norm; empty, where they are not wanted."""
    operands = images_BHWC, kernel_HWIO, norm, gradient_BHWO, out_BHWO, after
    channels = images_BHWC.shape[-1]
    shapes = (
        (images_BHWC.shape[0] * of_images, *images_BHWC.shape[1:]),
        (*kernel_HWIO.shape[:3], kernel_HWIO.shape[3] * of_kernel),
        (2 * (norm.shape[0] > 0) * of_images, channels),
    )
    pad = (kernel_HWIO.shape[0] - 1) // 2
    of_x, of_w, sums = library.call("backward", operands, shapes, stride=stride, pad=pad)
    return of_x, of_w, sums


@_unit_backward.defjvp
def _unit_backward_jvp(stride: int, of_images: bool, of_kernel: bool, primals: Any, tangents: Any) -> Any:
    def written_out(images: Array, kernel: Array, norm: Array, gradient: Array, out: Array, after: Array) -> Any:
        if after.shape[0]:
            gradient = gradient + normalised(out, after)
        _, back = jax.vjp(
            lambda *x: _written_out(*x, stride=stride, statistics=False, convolve=_VJP)[0], images, kernel, norm
        )
        of_x, of_w, of_norm = back(gradient)
        sums = jnp.stack([of_norm[1], of_norm[2]]) if norm.shape[0] else norm
        return of_x if of_images else of_x[:0], of_w if of_kernel else of_w[..., :0], sums if of_images else sums[:0]

    return jax.jvp(written_out, primals, tangents)


_unit: Any = jax.custom_vjp(_unit_forward, nondiff_argnums=(3, 4))


def _unit_fwd(images_BHWC: Any, kernel_HWIO: Any, norm: Any, stride: int, statistics: bool) -> Any:
    # Of what is not differentiated, as a network's input is not, no gradient is computed.
    of_images = images_BHWC.perturbed or norm.perturbed
    operands = images_BHWC.value, kernel_HWIO.value, norm.value
    out, seen = _unit_forward(*operands, stride, statistics)
    marks = ((),) * (2 * of_images + kernel_HWIO.perturbed)  # static, as a tree without leaves
    return (out, seen), (operands, out, seen, marks)


def _unit_bwd(stride: int, statistics: bool, saved: Any, gradients: Any) -> Any:
    (images, kernel, norm), out, seen, marks = saved
    of_images, of_kernel = len(marks) >= 2, len(marks) % 2 == 1
    gradient, of_statistics = (
        jnp.zeros(like.shape, like.dtype) if isinstance(given, SymbolicZero) else given
        for given, like in zip(gradients, (out, seen), strict=True)
    )
    after = seen
    if statistics:  # d mean / d value is 1 / n, d variance / d value is 2 (value - mean) / n
        n = out.size // out.shape[-1]
        after = jnp.stack([seen[0], of_statistics[1] * 2 / n, of_statistics[0] / n])
    operands = loops.vary_alike(images, kernel, norm, gradient, out, after)
    of_x, of_w, sums = _unit_backward(*operands, stride, of_images, of_kernel)
    of_norm = _of_norm(norm, sums) if sums.shape[0] else jnp.zeros_like(norm)
    return of_x if of_images else None, of_w if of_kernel else None, of_norm


_unit.defvjp(_unit_fwd, _unit_bwd, symbolic_zeros=True)


def _of_norm(norm: Array, sums: Array) -> Array:
    """The gradient of a norm [3, C]; sums: over all values, of their gradients times (value - mean), and of these."""
    return jnp.stack([-norm[1] * sums[1], sums[0], sums[1]])


def joined(images_BHWC: Array, norm_3C: Array, other_BHWC: Array | None, other_norm_3C: Array | None) -> Array:
    """ReLU of normed images plus others, normed where there is a norm for them; the gradient is `native`, in one go.

    Raises:
      ValueError: for other types than float32 and float64, or operands that do not belong together.
    """
    if images_BHWC.dtype not in ("float32", "float64"):
        raise ValueError(f"the images are {images_BHWC.dtype}; they must be float32 or float64.")
    _check(images_BHWC, norm_3C)
    if other_BHWC is not None:
        if (other_BHWC.shape, other_BHWC.dtype) != (images_BHWC.shape, images_BHWC.dtype):
            raise ValueError(f"what is added is {other_BHWC.shape}, {other_BHWC.dtype}: not like the images.")
        _check(other_BHWC, other_norm_3C)
    same = jnp.zeros_like(norm_3C).at[1].set(1)
    other = images_BHWC[:0] if other_BHWC is None else other_BHWC
    return _join(*loops.vary_alike(images_BHWC, norm_3C, other, same if other_norm_3C is None else other_norm_3C))


def _join_forward(images: Array, norm: Array, other: Array, other_norm: Array) -> Array:
    total = normalised(images, norm)
    return jax.nn.relu(total + normalised(other, other_norm) if other.shape[0] else total)


@jax.custom_jvp
def _join_backward(
    gradient: Array, out: Array, images: Array, norm: Array, other: Array, other_norm: Array
) -> list[Array]:
    sums = (2, images.shape[-1])
    shapes = images.shape, sums, other.shape, sums if other.shape[0] else (0, sums[1])
    return library.call("join", (gradient, out, images, norm, other, other_norm), shapes)


@_join_backward.defjvp
def _join_backward_jvp(primals: Any, tangents: Any) -> Any:
    def written_out(gradient: Array, _: Array, *operands: Array) -> list[Array]:
        of_images, of_norm, of_other, of_other_norm = jax.vjp(_join_forward, *operands)[1](gradient)
        return [of_images, of_norm[1:], of_other, of_other_norm[1:] if of_other.shape[0] else of_other_norm[:0]]

    return jax.jvp(written_out, primals, tangents)


_join: Any = jax.custom_vjp(_join_forward)


def _join_fwd(*operands: Array) -> Any:
    out = _join_forward(*operands)
    return out, (out, operands)


def _join_bwd(saved: Any, gradient: Array) -> Any:
    out, (images, norm, other, other_norm) = saved
    operands = loops.vary_alike(gradient, out, images, norm, other, other_norm)
    of_images, sums, of_other, other_sums = _join_backward(*operands)
    of_other_norm = _of_norm(other_norm, other_sums) if other_sums.shape[0] else jnp.zeros_like(other_norm)
    return of_images, _of_norm(norm, sums), of_other, of_other_norm


_join.defvjp(_join_fwd, _join_bwd)
