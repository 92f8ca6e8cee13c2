"""Optimisers whose hyperparameters are arrays, and learning-rate schedules.

Optax pieces with PyTorch's conventions. Learning rate and weight decay are arguments of each
update, not of the optimiser, so that trials with different values share one program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from plastic_jax.errors import InputError
from plastic_jax.study.config import OPTIMIZERS, SCHEDULES

Params = Any
"""A pytree of floating-point arrays."""

OptimiserState = Any
"""A pytree of arrays, stacked under `vmap` like the parameters."""


def build(optimizer: str, decoupled: bool = False, fused: Any = None) -> Optimiser:
    """The optimiser of that name.

    With u the update and g the gradient, to which `weight_decay * p` was added unless
    `decoupled`, every one of them sets p <- p - learning_rate * u:

    - `adam`: m <- .9 m + .1 g, v <- .999 v + .001 g^2,
      u = (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-8)  (Kingma & Ba 2015)
    - `rmsprop`: v <- .99 v + .01 g^2, u = g / (sqrt(v) + 1e-8)
    - `sgd`: u = g
    - `momentum`: m <- .9 m + g, u = m

    These are `torch.optim`'s Adam, RMSprop and SGD with their defaults (RMSprop's alpha is .99 and
    its eps stands outside the root, unlike Optax's).

    Args:
      optimizer: one of `OPTIMIZERS`.
      decoupled: subtract `learning_rate * weight_decay * p` beside the update instead of adding
        `weight_decay * p` to the gradient; with `adam` it is AdamW (Loshchilov & Hutter 2019).
      fused: Adam's update in one pass over memory where the kernels have it (`kernels.adam`), equal up to rounding.

    Raises:
      InputError: for another name.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}.")
    return Optimiser(optimizer, decoupled, fused)


@dataclass(frozen=True)
class Optimiser:
    """An update rule, from `build`; equal ones compare and hash equal, so it can be static."""

    optimizer: str
    decoupled: bool = False
    fused: Any = None

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The rule that makes u of g, without learning rate and weight decay."""
        if self.optimizer == "adam":
            return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
        if self.optimizer == "rmsprop":
            return optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)
        if self.optimizer == "momentum":
            return optax.trace(decay=0.9)
        return optax.identity()

    def init(self, params: Params) -> OptimiserState:
        """The state before the first step: all zeros."""
        return self.transformation.init(params)

    def update(
        self,
        grads: Params,
        opt_state: OptimiserState,
        params: Params,
        learning_rate: ArrayLike,
        weight_decay: ArrayLike,
        go: ArrayLike = True,
    ) -> tuple[Params, OptimiserState]:
        """One step.

        Args:
          grads: the loss's gradient, with the structure of `params`.
          opt_state: from `init` or the step before.
          params: all of them are decayed, biases and scales too, as in PyTorch.
          learning_rate: scalar, of this step.
          weight_decay: scalar; 0 for none.
          go: scalar; False leaves parameters and state as they are.

        Returns:
          The new parameters, with their types unchanged, and the new state.
        """

        if self.fused is not None and self.optimizer == "adam":
            decays = (0.0, weight_decay) if self.decoupled else (weight_decay, 0.0)
            return self.fused((grads, params), opt_state, go, learning_rate, *decays)

        def decay(step: Array, param: Array) -> Array:
            return step + jnp.asarray(weight_decay, param.dtype) * param

        def apply(param: Array, step: Array) -> Array:
            return param - jnp.asarray(learning_rate, param.dtype) * step

        if not self.decoupled:
            grads = jax.tree.map(decay, grads, params)
        steps, new_state = self.transformation.update(grads, opt_state, params)
        if self.decoupled:
            steps = jax.tree.map(decay, steps, params)
        new = jax.tree.map(apply, params, steps), new_state
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, (params, opt_state))


def schedule_factor(schedule: ArrayLike, step: ArrayLike, total_steps: ArrayLike) -> Array:
    """What the learning rate is multiplied with at that step of the stage.

    `constant`: 1; `cosine`: (1 + cos(pi t)) / 2; `linear`: 1 - t, with t = step / total_steps
    kept within 0 and 1.

    Args:
      schedule: a place in `SCHEDULES`; may be traced, like the others, so that one program serves all.
      step: steps of the stage already taken, from 0.
      total_steps: length of the stage in steps; the factor reaches 0 there.

    Returns:
      A float32 scalar in [0, 1].
    """
    total = jnp.maximum(jnp.asarray(total_steps, jnp.float32), 1)
    t = jnp.clip(jnp.asarray(step, jnp.float32) / total, 0, 1)
    factors = {"constant": jnp.ones_like(t), "cosine": 0.5 * (1 + jnp.cos(jnp.pi * t)), "linear": 1 - t}
    return jnp.stack([factors[name] for name in SCHEDULES])[schedule]
