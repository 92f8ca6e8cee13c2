"""L2 Init: regularisation towards the initial parameters (Kumar et al. 2023, arXiv 2308.11958)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from plastic_jax.fields import Field
from plastic_jax.methods.interventions.base import Intervention
from plastic_jax.methods.view import View

Tree = Any


class L2Init(Intervention):
    """Adds l2_init * |theta - theta_0|^2 to the loss; theta_0 are the trial's initial parameters."""

    fields = {
        "l2_init": Field(
            0.0, "dynamic", "L2 Init: weight of the squared distance to the initial parameters", low=0.0, off=0.0
        )
    }

    def remember(self, params: Tree) -> Tree:
        """theta_0."""
        return params

    def penalty(self, params: Tree, view: View) -> Array:
        """Over all parameters."""
        squares = jax.tree.map(lambda now, first: jnp.square(now - first).sum(), params, view.memory)
        return view.l2_init * sum(jax.tree.leaves(squares))


ENTRY = L2Init()
