"""Learning-rate schedules over a stage."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

SCHEDULES = ("constant", "cosine", "linear")


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
