"""The networks, by name. A model is a Flax module, written for a block of trials from the layers of `layers.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.models.mlp import Mlp
from plastic_jax.models.network import Gradients, Network
from plastic_jax.models.resnet import BLOCK_MODULES, ResNet
from plastic_jax.study.config import Config

__all__ = ["MODELS", "Gradients", "Model", "Network", "modules", "network"]


@dataclass(frozen=True)
class Model:
    """`build(point, classes)` makes the module; `modules(depth)` says how many a reset mask can address (figure 6).

    `convolutional`: whether trials can share the channels of its convolutions.
    """

    build: Callable[[Config, int], nn.Module]
    modules: Callable[[int], int]
    convolutional: bool = True


MODELS = {
    "resnet": Model(
        lambda point, classes: ResNet(point.width, point.depth, point.norm, classes), lambda _: BLOCK_MODULES + 2
    ),
    "mlp": Model(
        lambda point, classes: Mlp(point.width, point.depth, point.norm, classes),
        lambda depth: depth + 1,
        convolutional=False,
    ),
}


def modules(model: str, depth: int) -> int:
    """How many modules a reset mask can address: 6 in a ResNet, depth + 1 in an MLP."""
    return MODELS[model].modules(depth)


def network(point: Config, shape_HWC: tuple[int, int, int], classes: int, form: Form) -> Network:
    """The network of a point for images of that shape.

    Raises:
      InputError: for a model that is none.
    """
    if point.model not in MODELS:
        raise InputError(f"model is {point.model!r}; it must be one of {', '.join(MODELS)}.")
    module = MODELS[point.model].build(point, classes)
    return Network(module, shape_HWC, point.initialisation, point.compute_dtype, form)
