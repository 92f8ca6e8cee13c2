"""Interventions: what acts on a trial beside its optimiser. Each file here is one, and a word in `INTERVENTIONS`."""

from plastic_jax.methods.interventions.base import Intervention
from plastic_jax.registry import Registry

__all__ = ["INTERVENTIONS", "Intervention"]

INTERVENTIONS: Registry[Intervention] = Registry(
    "intervention", __name__, ("shrink_and_perturb", "l2_init", "redo", "weight_decay")
)
