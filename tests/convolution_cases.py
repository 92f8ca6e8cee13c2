"""Convolutions of all kinds, by name, and operands for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from plastic_jax.kernels import loops, units

TRIALS, BATCH, INPUTS, OUTPUTS = 2, 3, 3, 5

# XLA's passes as always, but little of LLVM's, which is what compiling takes its time for.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NHWC = ("NHWC", "HWIO", "NHWC")

# (taps, padding, stride): all that a ResNet has.
KINDS = [(3, 1, 1), (3, 1, 2), (1, 0, 1), (1, 0, 2)]


def conv(name):
    """A convolution of NHWC images and an HWIO kernel by that way."""

    def convolve(images, kernel, strides, pads):
        if name == "plain":
            return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=NHWC)
        if name == "native":
            return loops.convolution(images, kernel, strides, pads, units.convolve)
        return loops.convolution(images, kernel, strides, pads, lambda *x: loops.differentiable(*x, name))

    return convolve


def operands(kind, size, dtype, trials=TRIALS):
    """Images, kernels and output gradients with a leading trial axis."""
    taps, padding, stride = kind
    random = np.random.default_rng(0)
    out = [(side + 2 * padding - taps) // stride + 1 for side in size]
    shapes = (
        (trials, BATCH, *size, INPUTS),
        (trials, taps, taps, INPUTS, OUTPUTS),
        (trials, BATCH, *out, OUTPUTS),
    )
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(name, kind):
    """(images, kernel, output gradient) -> (output, image gradient, kernel gradient)."""
    _, padding, stride = kind

    def function(images, kernel, gradient):
        def convolve(images, kernel):
            pads = ((padding, padding), (padding, padding))
            return conv(name)(images, kernel, (stride, stride), pads)

        out, pullback = jax.vjp(convolve, images, kernel)
        return out, *pullback(gradient)

    return function


def assert_close(actual, expected, tolerance):
    """Within the tolerance of the largest value, with equal types and shapes."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())
