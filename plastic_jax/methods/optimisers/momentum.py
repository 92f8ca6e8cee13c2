"""Gradient descent with momentum as `torch.optim.SGD(momentum=.9)` has it."""

import optax

from plastic_jax.methods.optimisers import Optimiser


def momentum() -> optax.GradientTransformation:
    """m <- .9 m + g, u = m."""
    return optax.trace(decay=0.9)


ENTRY = Optimiser(momentum)
