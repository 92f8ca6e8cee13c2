"""The size of the parameters."""

from collections.abc import Mapping

import optax
from jax import Array

from plastic_jax.fields import Column
from plastic_jax.methods.diagnostics.base import Diagnostic
from plastic_jax.methods.view import View


class WeightNorm(Diagnostic):
    """The Euclidean norm of all parameters."""

    columns = (Column("weight_norm", "Euclidean norm of all parameters"),)

    def measure(self, view: View) -> Mapping[str, Array]:
        """One number."""
        return {"weight_norm": optax.tree.norm(view.params)}


ENTRY = WeightNorm()
