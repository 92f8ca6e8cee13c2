"""Dormant units (Sokar et al. 2023, arXiv 2302.12902, definition 3.1)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from plastic_jax.fields import Column, Field
from plastic_jax.methods.diagnostics.base import Diagnostic
from plastic_jax.methods.view import View


def scores(hidden: Array) -> Array:
    """Each unit's mean |activation| over its layer's mean: [B, .., C] -> [C]; zeros in a layer that is all zero."""
    means = jnp.abs(hidden).mean(range(hidden.ndim - 1))
    whole = means.mean()
    return jnp.where(whole > 0, means / jnp.where(whole > 0, whole, 1), 0.0)


def dormant(view: View, images: Array, threshold: Array | float) -> list[Array]:
    """For each of the model's units, [C] bool: whether its score is at most the threshold wherever it is seen."""
    hidden = view.hidden(images)
    return [jnp.stack([scores(hidden[place]) for place in layer.seen]).max(0) <= threshold for layer in view.units]


class DormantUnits(Diagnostic):
    """The share of hidden units, over all layers, whose score is at most `dormant_threshold`."""

    needs_units = True
    fields = {
        "dormant_threshold": Field(0.025, "run", "dormant_units: the score up to which a unit is dormant", low=0.0)
    }
    columns = (Column("dormant_units", "share of hidden units that are dormant", share=True),)

    def measure(self, view: View) -> Mapping[str, Array]:
        """On the activations after each non-linearity, images' positions counted like examples."""
        images, _ = view.batch()
        return {"dormant_units": jnp.concatenate(dormant(view, images, view.point.dormant_threshold)).mean()}


ENTRY = DormantUnits()
