"""The product of a linear layer, which `native` computes in `cc/native_dense.cc` on a CPU.

With the products of hidden layers and Adam's update (`adam`) computed there, a step of an MLP of 2 x 100 takes
0.45 (batch 32) and 0.73 (batch 128) of the time, of 2 x 256 0.53 and 0.71; with the update alone 0.63 to 0.87 (two
cores with AVX-512, 2026-11-25). The head, of ten columns, is left to XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from plastic_jax.kernels import library, loops


def product(inputs: Array, kernel: Array) -> Array:
    """[B, D] times [D, O].

    For reverse mode, and forwards over it, as every `custom_vjp`. What is no float32 or float64 is XLA's own product.
    """
    fits = inputs.dtype == kernel.dtype and inputs.dtype in ("float32", "float64")
    if fits and inputs.shape[1] == kernel.shape[0] and min(inputs.shape + kernel.shape) > 0:
        return _linear(*loops.vary_alike(inputs, kernel))
    return inputs @ kernel


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(a: Array, b: Array, a_turned: bool, b_turned: bool) -> Array:
    """[M, K] times [K, N]; `a_turned`: a is [K, M]; `b_turned`: b is [N, K]."""
    shape = (a.shape[a_turned], b.shape[1 - b_turned])
    return library.call("product", (a, b), [shape], a_turned=int(a_turned), b_turned=int(b_turned))[0]


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


def adam(trees: tuple[Any, ...], state: optax.ScaleByAdamState, go: ArrayLike, learning_rate: ArrayLike) -> Any:
    """Adam's update in one pass over memory, where XLA makes several.

    Args:
      trees: gradients and parameters.
      state: moments, and the count of the steps before.
      go: scalar; False leaves parameters and state as they are.
      learning_rate: scalar.

    Returns:
      The new parameters and state.

    Raises:
      ValueError: for gradients, parameters and moments of unlike shapes or types, or of other types.
    """
    leaves = [leaf for tree in (*trees, state.mu, state.nu) for leaf in jax.tree.leaves(tree)]
    each, dtype = len(leaves) // 4, leaves[0].dtype
    alike = [(leaf.shape, leaf.dtype) for leaf in leaves] == 4 * [(leaf.shape, dtype) for leaf in leaves[:each]]
    if not alike or dtype not in ("float32", "float64"):  # the native call reads memory by these
        raise ValueError("gradients, parameters and moments must be of the same shapes, all float32 or float64.")
    after = optax.safe_increment(state.count)
    unbias = [1 / (1 - jnp.asarray(b, dtype) ** after) for b in (0.9, 0.999)]
    numbers = jnp.stack([jnp.asarray(x, dtype) for x in (go, learning_rate, *unbias)])
    into = {1 + each + n: n for n in range(3 * each)}
    new = library.call("adam", (numbers, *leaves), [leaf.shape for leaf in leaves[each:]], into)
    structure = jax.tree.structure(trees[1])
    params, mu, nu = (jax.tree.unflatten(structure, new[k * each : (k + 1) * each]) for k in range(3))
    return params, optax.ScaleByAdamState(count=jnp.where(go, after, state.count), mu=mu, nu=nu)
