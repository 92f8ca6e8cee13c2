"""RMSprop as `torch.optim.RMSprop` has it: unlike Optax's, its eps stands outside the root."""

import optax

from plastic_jax.methods.optimisers import Optimiser


def rmsprop() -> optax.GradientTransformation:
    """v <- .99 v + .01 g^2, u = g / (sqrt(v) + 1e-8)."""
    return optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)


ENTRY = Optimiser(rmsprop)
