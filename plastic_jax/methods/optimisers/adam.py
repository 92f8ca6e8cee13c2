"""Adam (Kingma & Ba 2015) as `torch.optim.Adam` has it."""

import optax

from plastic_jax.methods.optimisers import Optimiser


def adam() -> optax.GradientTransformation:
    """m <- .9 m + .1 g, v <- .999 v + .001 g^2, u = (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-8)."""
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


ENTRY = Optimiser(adam)
