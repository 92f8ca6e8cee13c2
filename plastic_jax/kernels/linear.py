"""The product of a linear layer, which `native` computes in `native_dense.cc` on a CPU.

With the products of hidden layers and Adam's update (`optimisers.py`) computed there, a step of an MLP of 2 x 100 takes
0.45 (batch 32) and 0.73 (batch 128) of the time, of 2 x 256 0.53 and 0.71; with the update alone 0.63 to 0.87 (two
cores with AVX-512, 2026-11-25). The head, of ten columns, is left to XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array, lax

from plastic_jax.kernels import loops, native

_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


def dot(name: str) -> Callable[..., Array]:
    """The product for `flax.linen.Dense(dot_general=...)`: `lax.dot_general`, or with `native` that of the same values.

    That one is for reverse mode, and forwards over it, as every `custom_vjp`.

    Args:
      name: one of `convolution.FORMULATIONS`.

    Raises:
      InputError: for `native` on a machine that cannot compile it.
    """
    if name != "native":
        return lax.dot_general
    native.require("cpu")
    return _native


def _native(
    inputs: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    fits = (
        dimension_numbers == _ROWS_BY_COLUMNS
        and inputs.ndim == kernel.ndim == 2
        and inputs.dtype == kernel.dtype
        and inputs.dtype in ("float32", "float64")
        and preferred_element_type in (None, inputs.dtype)
        and min(inputs.shape + kernel.shape) > 0
    )
    if fits:
        return _linear(*loops.vary_alike(inputs, kernel))
    return lax.dot_general(inputs, kernel, dimension_numbers, precision, preferred_element_type)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(a: Array, b: Array, a_turned: bool, b_turned: bool) -> Array:
    """[M, K] times [K, N]; `a_turned`: a is [K, M]; `b_turned`: b is [N, K]."""
    shape = (a.shape[a_turned], b.shape[1 - b_turned])
    return native.call("product", (a, b), [shape], a_turned=int(a_turned), b_turned=int(b_turned))[0]


# XLA knows no derivatives of the native calls: differentiated once more, they are its own products.
@_product.defjvp
def _product_jvp(a_turned: bool, b_turned: bool, primals: Any, tangents: Any) -> Any:
    over = (((int(not a_turned),), (int(b_turned),)), ((), ()))
    return jax.jvp(lambda a, b: lax.dot_general(a, b, over), primals, tangents)


@jax.custom_vjp
def _linear(inputs: Array, kernel: Array) -> Array:
    return _product(inputs, kernel, False, False)


def _linear_fwd(inputs: Array, kernel: Array) -> Any:
    return _product(inputs, kernel, False, False), (inputs, kernel)


def _linear_bwd(saved: Any, gradient: Array) -> Any:
    inputs, kernel = saved
    return _product(gradient, kernel, False, True), _product(inputs, gradient, True, False)


_linear.defvjp(_linear_fwd, _linear_bwd)
