"""A small convolutional network, as a user would add one."""

import flax.linen as nn
from jax import Array

from plastic_jax.kernels import Activations
from plastic_jax.models import layers


class SmallNet(nn.Module):
    """Two convolutions, the second without norm and bias, and a hidden layer."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, images: Activations, *, train: bool) -> Array:
        x = First(self.width, name="module_1")(images, train=train)
        x = layers.relu(layers.Conv(2 * self.width, stride=2, name="module_2")(x))
        x = layers.relu(layers.Dense(4 * self.width, name="module_3")(layers.flatten(x)))
        return layers.logits(layers.Dense(self.classes, full_precision=True, name="module_4")(x))


class First(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    width: int

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        x = layers.Conv(self.width, name="conv")(x)
        return layers.relu(layers.BatchNorm(name="norm")(x, train=train))
