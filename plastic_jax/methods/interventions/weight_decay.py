"""Weight decay, in the gradient or beside it (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

from typing import Any

import jax

from plastic_jax.fields import Field
from plastic_jax.methods.interventions.base import Intervention
from plastic_jax.methods.view import View

Tree = Any


class WeightDecay(Intervention):
    """Of all parameters, biases and scales too, as in PyTorch.

    In the gradient: g + weight_decay * theta. Decoupled, as AdamW has it: u + weight_decay * theta, where u is what the
    optimiser makes of g and the learning rate multiplies both.
    """

    fields = {
        "weight_decay": Field(0.0, "dynamic", "weight decay, as L2 in the gradient", low=0.0, off=0.0),
        "decoupled": Field(False, "static", "weight decay apart from the gradient (AdamW) instead"),
    }

    def gradient(self, gradients: Tree, view: View) -> Tree:
        """The first way."""
        return gradients if view.point.decoupled else _decayed(gradients, view)

    def update(self, update: Tree, view: View) -> Tree:
        """The second."""
        return _decayed(update, view) if view.point.decoupled else update


def _decayed(tree: Tree, view: View) -> Tree:
    return jax.tree.map(lambda step, param: step + view.weight_decay.astype(param.dtype) * param, tree, view.params)


ENTRY = WeightDecay()
