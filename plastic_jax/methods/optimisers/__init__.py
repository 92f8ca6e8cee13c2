"""Optimisers: Optax's rules with PyTorch's conventions, whose learning rate is an array.

Each file here is one, and a word in `OPTIMISERS`. The learning rate is an argument of each update, not of the
optimiser, so that trials with different values share one program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from plastic_jax.registry import Registry

Params = Any
"""A pytree of floating-point arrays."""

OptimiserState = Any
"""A pytree of arrays, stacked under `vmap` like the parameters."""


@dataclass(frozen=True)
class Optimiser:
    """An update rule p <- p - learning_rate * u; equal ones compare and hash equal, so it can be static.

    Args:
      transformation: makes the rule that makes u of the gradient, without the learning rate: `optax.scale_by_adam`,
        not `optax.adam`.
      keeps_state: whether anything is carried from step to step.
      fused: the whole update in one pass over memory, where the kernels have it (`kernels.adam`), equal up to rounding.
    """

    transformation: Callable[[], optax.GradientTransformation]
    keeps_state: bool = True
    fused: Any = None

    def init(self, params: Params) -> OptimiserState:
        """The state before the first step: all zeros."""
        return self.transformation().init(params)

    def update(
        self,
        gradients: Params,
        state: OptimiserState,
        params: Params,
        learning_rate: ArrayLike,
        go: ArrayLike = True,
        change: Callable[[Params], Params] | None = None,
    ) -> tuple[Params, OptimiserState]:
        """One step.

        Args:
          gradients: of the loss, with the structure of `params`.
          state: from `init` or the step before.
          params: the parameters before.
          learning_rate: scalar, of this step.
          go: scalar; False leaves parameters and state as they are.
          change: what is done to u before it is multiplied by the learning rate.

        Returns:
          The new parameters, with their types unchanged, and the new state.
        """
        if self.fused is not None and change is None:
            return self.fused((gradients, params), state, go, learning_rate)

        def apply(param: Array, u: Array) -> Array:
            return param - jnp.asarray(learning_rate, param.dtype) * u

        u, new_state = self.transformation().update(gradients, state, params)
        new = jax.tree.map(apply, params, u if change is None else change(u)), new_state
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, (params, state))


OPTIMISERS: Registry[Optimiser] = Registry("optimizer", __name__, ("adam", "rmsprop", "sgd", "momentum"))


def build(optimizer: str, fused: Any = None) -> Optimiser:
    """The optimiser of that name; `fused`: its update in one pass, if it is Adam.

    Raises:
      InputError: for a name that is none.
    """
    found = OPTIMISERS.require(optimizer)
    return Optimiser(found.transformation, found.keeps_state, fused if optimizer == "adam" else None)
