"""Diagnostics: what is measured beside accuracy and loss. Each file here is one, and a word in `DIAGNOSTICS`."""

from plastic_jax.fields import Column
from plastic_jax.methods.diagnostics.base import Diagnostic
from plastic_jax.registry import Registry

__all__ = ["DIAGNOSTICS", "Column", "Diagnostic"]

DIAGNOSTICS: Registry[Diagnostic] = Registry("diagnostic", __name__, ("dormant_units", "weight_norm"))
