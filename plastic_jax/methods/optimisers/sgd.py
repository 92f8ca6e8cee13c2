"""Stochastic gradient descent."""

import optax

from plastic_jax.methods.optimisers import Optimiser


def sgd() -> optax.GradientTransformation:
    """The gradient itself: u = g."""
    return optax.identity()


ENTRY = Optimiser(sgd, keeps_state=False)
