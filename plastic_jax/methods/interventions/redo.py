"""ReDo: recycling dormant units (Sokar et al. 2023, arXiv 2302.12902)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from plastic_jax.fields import Field
from plastic_jax.methods.diagnostics.dormant_units import dormant
from plastic_jax.methods.interventions.base import Intervention
from plastic_jax.methods.view import Trained, View
from plastic_jax.models.units import chosen


class ReDo(Intervention):
    """Every `redo_interval` updates, of each unit whose score is at most `redo_threshold` (section 4 of the paper):

    incoming weights, biases and norms are drawn anew, outgoing weights are zero, and the optimiser's moments of both
    are zero. The score is that of `dormant_units`, on the batch of the last update.
    """

    needs_units = True
    fields = {
        "redo_interval": Field(0, "static", "ReDo: updates from one recycling of dormant units to the next; 0 = off",
                               low=0, off=0),
        "redo_threshold": Field(0.1, "dynamic", "ReDo: the score up to which a unit is dormant", low=0.0),
    }  # fmt: skip

    def interval(self, point: Any) -> int:
        """As the field says."""
        return point.redo_interval

    def at_interval(self, view: View) -> Trained:
        """A unit that is dead adds nothing, so that its reset leaves the network's outputs as they are."""
        images, _ = view.batch()
        which = dormant(view, images, view.redo_threshold)
        trained, fresh = view.trained, view.fresh()

        def mask(tree: Any, side: str) -> Any:
            return chosen(view.units, which, tree, side, view.flax_layout)

        into, out = mask(trained.params, "incoming"), mask(trained.params, "outgoing")
        params = jax.tree.map(
            lambda old, new, one, other: jnp.where(other, 0.0, jnp.where(one, new, old)),
            trained.params, fresh.params, into, out,
        )  # fmt: skip
        stats = jax.tree.map(
            lambda old, new, one: jnp.where(one, new, old),
            trained.batch_stats, fresh.batch_stats, mask(trained.batch_stats, "incoming"),
        )  # fmt: skip
        moments = optax.tree_utils.tree_map_params(
            view.optimiser, lambda m, one, other: jnp.where(one | other, 0.0, m), trained.optimiser, into, out
        )
        return Trained(params, stats, moments)


ENTRY = ReDo()
