"""The paper's ResNet for small images (He et al. 2016): ResNet-18 is width 64, depth 2."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jax import Array

from plastic_jax.kernels import Activations
from plastic_jax.models import Model, Units, layers

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
        x = layers.relu(layers.normalise(self.norm, "norm", x, train))
        self.sow("units", "hidden", x)
        return x


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
        self.sow("units", "inner", x)
        x = layers.relu(layers.add(convolved("_2", x, 3, 1), shortcut))
        self.sow("units", "outer", x)
        return x


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


def units(point: Any) -> tuple[Units, ...]:
    """The channels of the stem, and within and after each block.

    A block whose shortcut is the identity adds to the channels that it gets. So these are the same units from the stem,
    or from the block that starts them, through all blocks that add to them.
    """
    inner, streams = [], [_Stream(["module_1/hidden"], ["module_1/conv"], ["module_1/norm"], [])]
    for number in range(2, BLOCK_MODULES + 2):
        for block in range(1, point.depth + 1):
            name = f"module_{number}/block_{block}"
            now = streams[-1]
            now.readers.append(f"{name}/conv_1")
            inner.append(Units((f"{name}/inner",), (f"{name}/conv_1",), (f"{name}/conv_2",), (f"{name}/norm_1",)))
            if number > 2 and block == 1:  # the stride and the channels change
                now.readers.append(f"{name}/conv_shortcut")
                now = _Stream([], [f"{name}/conv_shortcut"], [f"{name}/norm_shortcut"], [])
                streams.append(now)
            now.seen.append(f"{name}/outer")
            now.makers.append(f"{name}/conv_2")
            now.norms.append(f"{name}/norm_2")
    streams[-1].readers.append(f"module_{BLOCK_MODULES + 2}")
    outer = [Units(tuple(s.seen), tuple(s.makers), tuple(s.readers), tuple(s.norms)) for s in streams]
    return (*outer, *inner)


@dataclass
class _Stream:
    """Channels that several layers add to: where they are seen, what makes them, and what reads them."""

    seen: list[str]
    makers: list[str]
    norms: list[str]
    readers: list[str]


ENTRY = Model(
    build=lambda point, classes: ResNet(point.width, point.depth, point.norm, classes),
    modules=lambda _: BLOCK_MODULES + 2,
    units=units,
)
