"""A multi-layer perceptron."""

from typing import Any

import flax.linen as nn
from jax import Array

from plastic_jax.kernels import Activations
from plastic_jax.models import Model, Units, layers


class Mlp(nn.Module):
    """Hidden layers `module_1 .. module_depth` of `width` units, head `module_{depth + 1}` (the paper's figure 6)."""

    width: int
    depth: int
    norm: str
    classes: int

    @nn.compact
    def __call__(self, images: Activations, *, train: bool) -> Array:
        """Logits [T, B, classes]."""
        x = layers.flatten(images)
        for layer in range(1, self.depth + 1):
            x = Hidden(self.width, self.norm, name=f"module_{layer}")(x, train=train)
        return layers.logits(layers.Dense(self.classes, full_precision=True, name=f"module_{self.depth + 1}")(x))


class Hidden(nn.Module):
    """Linear, norm, ReLU: (B, D) -> (B, width)."""

    width: int
    norm: str

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """Of `width` units."""
        x = layers.Dense(self.width, name="linear")(x)
        x = layers.relu(layers.normalise(self.norm, "norm", x, train))
        self.sow("units", "hidden", x)
        return x


def units(point: Any) -> tuple[Units, ...]:
    """Each hidden layer's."""

    def layer(number: int) -> Units:
        name, following = f"module_{number}", f"module_{number + 1}"
        reader = following if number == point.depth else f"{following}/linear"
        return Units((f"{name}/hidden",), (f"{name}/linear",), (reader,), (f"{name}/norm",))

    return tuple(layer(number) for number in range(1, point.depth + 1))


ENTRY = Model(
    build=lambda point, classes: Mlp(point.width, point.depth, point.norm, classes),
    modules=lambda depth: depth + 1,
    units=units,
    convolutional=False,
)
