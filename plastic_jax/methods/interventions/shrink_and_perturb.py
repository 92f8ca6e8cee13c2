"""Shrink and perturb (Ash & Adams 2020, arXiv 1910.08475)."""

from dataclasses import replace

import jax

from plastic_jax.fields import Field
from plastic_jax.methods.interventions.base import Intervention
from plastic_jax.methods.view import Trained, View


class ShrinkAndPerturb(Intervention):
    """theta <- shrink * theta + perturb * phi when a stage after the first begins, phi drawn as an initialisation.

    All parameters, as in their code: (1, 0) is a warm start and (0, 1) a fresh one. Their paper has (0.6, 0.01), their
    code (0.4, 0.1).
    """

    fields = {
        "shrink": Field(
            1.0, "dynamic", "shrink & perturb: what parameters are multiplied with when a later stage begins",
            low=0.0, high=1.0, off=1.0,
        ),
        "perturb": Field(
            0.0, "dynamic", "shrink & perturb: how much of a fresh initialisation is added then", low=0.0, off=0.0
        ),
    }  # fmt: skip

    def at_start(self, view: View) -> Trained:
        """Leaves statistics and the optimiser's state to `batch_stats` and `reset_optimizer`."""
        mixed = jax.tree.map(lambda old, new: view.shrink * old + view.perturb * new, view.params, view.fresh().params)
        return replace(view.trained, params=mixed)


ENTRY = ShrinkAndPerturb()
