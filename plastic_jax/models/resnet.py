"""The paper's ResNet for small images (He et al. 2016): ResNet-18 is width 64, depth 2."""

import flax.linen as nn
from jax import Array

from plastic_jax.kernels import Activations
from plastic_jax.models import layers

BLOCK_MODULES = 4  # the modules of basic blocks, with w, 2w, 4w and 8w channels


class ResNet(nn.Module):
    """Stem `module_1`, basic blocks `module_2 .. module_5`, head `module_6` (the modules of the paper's figure 6).

    A 3x3 stem with stride 1 and no pooling, four modules of `depth` basic blocks, the last three of which start with
    stride 2, global average pool, linear head. `norm` is `batch`, `layer` or `none`; only with `none` do convolutions
    have a bias.
    """

    width: int
    depth: int
    norm: str
    classes: int

    @nn.compact
    def __call__(self, images: Activations, *, train: bool) -> Array:
        """Logits [T, B, classes]."""
        x = Stem(self.width, self.norm, name="module_1")(images, train=train)
        for number in range(BLOCK_MODULES):
            channels, stride = self.width * 2**number, 1 if number == 0 else 2
            x = Blocks(channels, self.norm, self.depth, stride, name=f"module_{number + 2}")(x, train=train)
        head = layers.Dense(self.classes, full_precision=True, name=f"module_{BLOCK_MODULES + 2}")
        return layers.logits(head(layers.pool(x)))


class Stem(nn.Module):
    """Convolution, norm, ReLU."""

    channels: int
    norm: str

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """(B, H, W, C) -> (B, H, W, channels)."""
        x = layers.Conv(self.channels, use_bias=self.norm == "none", name="conv")(x)
        return layers.relu(layers.normalise(self.norm, "norm", x, train))


class Block(nn.Module):
    """A basic block; the shortcut is a 1x1 convolution where the stride or the channels change."""

    channels: int
    norm: str
    stride: int = 1

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels), rounded up."""

        def convolved(name: str, x: Activations, taps: int, stride: int) -> Activations:
            conv = layers.Conv(self.channels, taps, stride, use_bias=self.norm == "none", name=f"conv{name}")
            return layers.normalise(self.norm, f"norm{name}", conv(x), train)

        x = shortcut = layers.shared(x)
        if self.stride != 1 or x.shape[-1] != self.channels:
            shortcut = convolved("_shortcut", x, 1, self.stride)
        x = layers.relu(convolved("_1", x, 3, self.stride))
        x = convolved("_2", x, 3, 1)
        return layers.relu(layers.add(x, shortcut))


class Blocks(nn.Module):
    """`depth` basic blocks `block_1 .. block_depth`, the first of them with the stride."""

    channels: int
    norm: str
    depth: int
    stride: int

    @nn.compact
    def __call__(self, x: Activations, *, train: bool) -> Activations:
        """As the first block."""
        for block in range(1, self.depth + 1):
            stride = self.stride if block == 1 else 1
            x = Block(self.channels, self.norm, stride, name=f"block_{block}")(x, train=train)
        return x
