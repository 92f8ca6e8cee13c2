"""What a training step and an evaluation of the project's own networks take, in closed form, as XLA counts them.

FLOPs are those of the optimised program: two for a multiply-add, only for the taps that fall inside the image; one for
an addition, comparison or selection of one value; none for square roots and exponentials, which XLA counts apart. It
fuses cheap operations into every consumer of their result, which computes them anew; the tables were read off its
programs (JAX 0.10.2, CPU). Where a batch's activations hold fewer than about 4096 values, XLA computes still more of
them anew (up to 5 % of a step), which is not counted here.
"""

import math
from dataclasses import dataclass

from plastic_jax.data import DatasetSpec
from plastic_jax.study.config import Config
from plastic_jax.train.costs import parameters_count

# FLOPs of an update for one parameter, without weight decay, up to the choice of the old value after a
# non-finite loss (contract 6). Parameters and moments are each computed from the gradient on their own.
_UPDATE = {"sgd": 3, "momentum": 8, "rmsprop": 15, "adam": 23}

# FLOPs for one value that comes out of a layer, by norm ("none": its bias).
_APPLY = {"none": 1, "batch": 3, "layer": 4}  # from the layer's output to the ReLU's input
_TRAIN = {"none": 1, "batch": 17, "layer": 19}  # statistics, and the gradients of norm, scale and bias
_TRAIN_AGAIN = {"none": 0, "batch": 5, "layer": 1}  # the norm's gradient, for a convolution's input gradient
_EVALUATE = {"none": 0, "batch": 0, "layer": 4}  # statistics

_NORMALISE = 4  # FLOPs for one value of an image, from uint8
_LOSS = 19  # FLOPs for a logit: bias, cross-entropy, its gradient and the hit


def update_flops(point: Config, spec: DatasetSpec) -> int:
    """Of a step's update."""
    return _UPDATE[point.optimizer] * parameters_count(point, spec)


def step_flops(point: Config, spec: DatasetSpec) -> float:
    """Of one training step: forward, backward and update."""
    net = tally(point, spec)
    step = net.products + net.elementwise + _LOSS * spec.classes
    return float(point.batch_size * step + update_flops(point, spec))


def evaluation_flops(point: Config, spec: DatasetSpec) -> float:
    """Of one image in evaluation mode."""
    net = tally(point, spec)
    return float(net.forward + net.evaluation)


def tally(point: Config, spec: DatasetSpec) -> "Tally":
    """The sums over a network's layers."""
    return (_mlp if point.model == "mlp" else _resnet)(point, spec)


@dataclass
class Tally:
    """Sums over a network's layers, for one image."""

    norm: str
    convolutional: bool
    products: int = 0  # FLOPs of convolutions and linear layers, forward and backward
    padded: int = 0  # the same with all taps
    forward: int = 0  # the same of the forward pass alone
    elementwise: int = 0  # all other FLOPs of a training step
    evaluation: int = 0  # all other FLOPs of an evaluation
    outputs: int = 0  # values that come out of the layers before the head
    channels: int = 0  # channels of the norms
    alive: int = 0  # most values that an evaluation needs at a time

    def linear(self, inputs: int, outputs: int) -> None:
        """Count a linear layer."""
        forward, gradients = 2 * inputs * outputs, 2 if self.products else 1
        self.forward += forward
        self.products += (1 + gradients) * forward
        self.padded += (1 + gradients) * forward

    def normalised(self, values: int, channels: int, training: int) -> None:
        """Count a layer's output and its norm at `training` FLOPs a value in training."""
        self.outputs += values
        self.channels += channels
        self.elementwise += training * values
        self.evaluation += _EVALUATE[self.norm] * values

    def activated(self, values: int, anew: int, consumers: int) -> None:
        """Count a ReLU whose input takes `anew` FLOPs a value to be computed anew.

        That happens for each of its consumers, and for its gradient's mask, which is compared and selects.
        """
        self.elementwise += (consumers * (anew + 1) + anew + 2) * values
        self.evaluation += (anew + 1) * values


def _mlp(point: Config, spec: DatasetSpec) -> Tally:
    net, inputs = Tally(point.norm, False), math.prod(spec.shape)
    net.elementwise = net.evaluation = _NORMALISE * inputs
    bias = int(point.norm != "none")  # beside the norm's own
    for _ in range(point.depth):
        net.linear(inputs, point.width)
        # The bias is added anew in four passes of the norm, and its gradient summed.
        net.normalised(point.width, point.width, _TRAIN[point.norm] + 5 * bias)
        net.activated(point.width, _APPLY[point.norm] + bias, consumers=1)
        net.evaluation += (2 if point.norm == "layer" else 0) * point.width
        inputs = point.width
    net.linear(inputs, spec.classes)
    net.alive = 2 * point.width  # a layer's output and its activation; the images are counted apart
    return net


def _resnet(point: Config, spec: DatasetSpec) -> Tally:
    net, apply = Tally(point.norm, True), _APPLY[point.norm]
    height, width, channels = spec.shape
    # Training normalises the image twice: for the kernel's gradient in another layout.
    net.evaluation = _NORMALISE * height * width * channels
    net.elementwise = 2 * net.evaluation

    def convolve(channels: int, stride: int, taps: int = 3, shared: int = 0) -> None:
        """Count a convolution of `before` and its norm, of which `shared` sums are another layer's too."""
        first = not net.products
        (h, up), (w, across) = (_taps(size, taps, stride) for size in before[:2])
        inside, pair = up * across, 2 * before[2] * channels
        net.forward += pair * inside
        net.products += pair * inside * (2 if first else 3)
        net.padded += pair * h * w * taps**2 * (2 if first else 3)
        again = 0 if first else _TRAIN_AGAIN[point.norm]
        net.normalised(h * w * channels, channels, _TRAIN[point.norm] + again - shared)

    before = (height, width, channels)
    halved = math.prod(_taps(size, 3, 2)[0] for size in before[:2])
    ahead = 0 if point.norm == "layer" else 4 * halved * 2 * point.width
    convolve(point.width, 1)
    values = height * width * point.width
    net.activated(values, apply, consumers=2)
    before, stream = (height, width, point.width), apply + 1  # FLOPs to compute the block's input anew
    for module in range(4):
        for block in range(point.depth):
            last = module == 3 and block == point.depth - 1
            stride = 2 if module and not block else 1
            inputs, channels = math.prod(before), point.width * 2**module
            net.elementwise += inputs  # the sum of the gradients from the convolution and from the shortcut
            if stride == 2:
                convolve(channels, stride, taps=1, shared=1)
                stream = apply
            convolve(channels, stride)
            before = (*(_taps(size, 3, stride)[0] for size in before[:2]), channels)
            values = math.prod(before)
            net.activated(values, apply, consumers=2)
            convolve(channels, 1)
            stream += apply + 1
            net.activated(values, stream, consumers=1 if last else 2)
            stream += 1
            # The block's input, an activation and an output. XLA also repeats the vectors of the first two
            # summed biases or BatchNorms to the size of an output, ahead of time (LayerNorm's it does not).
            net.alive = max(net.alive, inputs + 2 * values + ahead)
    net.elementwise += 2 * values  # the mean over the pixels, and its gradient
    net.evaluation += values
    net.linear(channels, spec.classes)
    return net


def _taps(size: int, taps: int, stride: int) -> tuple[int, int]:
    """Of a convolution along an axis: outputs, and pairs of output and tap inside the image."""
    pad = (taps - 1) // 2
    outputs = (size - 1) // stride + 1
    inside = [sum(0 <= i * stride + tap - pad < size for i in range(outputs)) for tap in range(taps)]
    return outputs, sum(inside)
