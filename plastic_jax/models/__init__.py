"""The networks, by name. Each file here is one, and a word in `MODELS`.

A model is a Flax module, written for a block of trials from the layers of `layers.py`; or any Flax module for one
trial, with layers of Flax's own (`flax_module.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from plastic_jax.kernels import Form
from plastic_jax.models.flax_module import OneByOne
from plastic_jax.models.network import Gradients, Network
from plastic_jax.models.units import Units
from plastic_jax.registry import Registry

__all__ = ["MODELS", "Gradients", "Model", "Network", "Units", "modules", "network"]


@dataclass(frozen=True)
class Model:
    """A network that a config can name.

    `build(point, classes)` makes the module from a config's static values. `modules(depth)` says how many modules a
    reset can address (figure 6): they are named `module_1` to `module_k`; 0 for a model whose modules have other names.
    `units(point)` are its hidden units (`units.py`); none where it does not declare them. `convolutional`: whether
    trials can share the channels of its convolutions. `plain`: the module is for one trial, of Flax's own layers,
    `module(images [B, H, W, C], train=...) -> logits [B, classes]`.
    """

    build: Callable[[Any, int], nn.Module]
    modules: Callable[[int], int] = lambda _: 0
    units: Callable[[Any], tuple[Units, ...]] = lambda _: ()
    convolutional: bool = True
    plain: bool = False


MODELS: Registry[Model] = Registry("model", __name__, ("mlp", "resnet"))


def modules(model: str, depth: int) -> int:
    """How many modules a reset mask can address: 6 in a ResNet, depth + 1 in an MLP."""
    return MODELS.require(model).modules(depth)


def network(point: Any, shape_HWC: tuple[int, int, int], classes: int, form: Form) -> Network:
    """The network of a point of the config for images of that shape.

    Raises:
      InputError: for a model that is none.
    """
    model = MODELS.require(point.model)
    module = model.build(point, classes)
    if model.plain:
        module = OneByOne(module)
    return Network(module, shape_HWC, point.initialisation, point.compute_dtype, form)
