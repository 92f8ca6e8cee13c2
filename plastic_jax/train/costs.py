"""What a trial costs in FLOPs and bytes, in closed form: for a plan, also of a device that is not there.

FLOPs are counted as XLA counts them in its optimised program: two for a multiply-add, only for the taps that
fall inside the image; one for an addition, comparison or selection of one value; none for square roots and
exponentials, which it counts apart. XLA fuses cheap operations into every consumer of their result, which
computes them anew; the tables below were read off its programs (JAX 0.10.2, CPU). That matters for narrow
nets only: at w = 64 all but 1 % are convolutions. Where a batch's activations hold fewer than about 4096
values, XLA computes still more of them anew (up to 5 % of a step), which is not counted here.

Bytes are estimates, but for state and data: the compiler decides what to keep.
"""

import functools
import math
from dataclasses import dataclass

import jax

from plastic_jax import models
from plastic_jax.data import DatasetSpec, sampler
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import core

# FLOPs of an update for one parameter, from the gradient's decay to the choice of the old value after a
# non-finite loss (contract 6). Parameters and moments are each computed from the gradient on their own.
_UPDATE = {"sgd": 5, "momentum": 12, "rmsprop": 19, "adam": 29}
_MOMENTS = {"sgd": 0, "momentum": 1, "rmsprop": 1, "adam": 2}

# FLOPs for one value that comes out of a layer, by norm ("none": its bias).
_APPLY = {"none": 1, "batch": 3, "layer": 4}  # from the layer's output to the ReLU's input
_TRAIN = {"none": 1, "batch": 17, "layer": 19}  # statistics, and the gradients of norm, scale and bias
_TRAIN_AGAIN = {"none": 0, "batch": 5, "layer": 1}  # the norm's gradient, for a convolution's input gradient
_EVALUATE = {"none": 0, "batch": 0, "layer": 4}  # statistics

# Arrays of the size of a layer's output that wait for its backward pass: that output and the activation; with
# BatchNorm the values less their mean, with LayerNorm those and the normalised ones.
_KEPT = {"none": 2, "batch": 3, "layer": 4}

# The same for packed blocks, read off the programs that XLA compiles for an H100 (JAX 0.10.2): a norm's gradient is
# computed from its input alone.
_KEPT_PACKED = {"none": 1.6, "batch": 2.2, "layer": 2.2}
_KEPT_MLP = 0.8

_NORMALISE = 4  # FLOPs for one value of an image, from uint8
_LOSS = 19  # FLOPs for a logit: bias, cross-entropy, its gradient and the hit
_SORT = 8  # int32 for each train example while an epoch's order is drawn: keys, numbers, their sorted copies
_ORDERS = 3  # int32 for each train example while an epoch runs: the next order, and both orders in one array


@dataclass(frozen=True)
class Costs:
    """FLOPs and bytes of one trial, unless a field says otherwise."""

    parameters: int
    step_flops: float
    """One training step at the trial's batch size: forward, backward and update, as XLA counts."""
    padded_step_flops: float
    """Convolutions and linear layers of that step alone, with all taps: what utilisation figures use."""
    traffic_bytes: float
    """Least memory traffic of a training step: each layer's output written once, read once by the forward and twice
    by the backward pass, in `compute_dtype`; parameters and moments read and written, the gradient too."""
    evaluation_flops: float
    """Forward pass of one image in evaluation mode, as XLA counts."""
    state_bytes: int
    """Exact: parameters, statistics, optimiser state, order, counters, and the view of the train set."""
    activation_bytes: int
    """Estimate: the temporaries of a step, of an evaluation batch or of drawing an order, whichever are most.

    A step keeps for each layer what its backward pass needs (`_KEPT`). Counted in `compute_dtype`, which a
    CPU does not honour: it computes bfloat16 through float32.
    """
    trial_bytes: int
    """Estimate: all that one trial needs besides the data set. `resident_bytes` plus `working_bytes`."""
    dataset_bytes: int
    """Exact: the resident data, once a device."""
    resident_bytes: int
    """A slot's share while any trial computes: its state before and after the chunk."""
    working_bytes: int
    """What a trial needs beside that while it computes: a copy of the state, gradients and activations."""

    packed_bytes: int = 0
    """Estimate: a trial's share of the temporaries of a block's step."""
    between_bytes: int = 0
    """Estimate: the temporaries of an evaluation batch or of drawing an order, whichever are more."""
    expanded_bytes: int = 0
    """Estimate: a convolutional net's kernels in the type to compute in, of which a group of G trials side by side
    holds G times as much for each, zeros included."""
    convolutional: bool = True

    def device_bytes(self, slots: int, together: int, group: int = 1) -> int:
        """Estimate of all that a device needs.

        Args:
          slots: trials that are on the device.
          together: how many of them compute at a time: a form's `block`.
          group: how many of these are side by side in the channels.
        """
        block = min(slots, together)
        copied = self.working_bytes - self.activation_bytes  # of the state, and gradients
        return self.dataset_bytes + slots * self.resident_bytes + block * copied + self.temporaries(block, group)

    def temporaries(self, block: int, group: int) -> int:
        """Estimate of what a block's step holds beside its trials' states."""
        if block == 1:
            return self.activation_bytes
        return max(self.step_temporaries(block, group), block * self.between_bytes)

    def step_temporaries(self, block: int, group: int) -> int:
        """That of a training step alone."""
        if block == 1:
            return self.activation_bytes
        return block * (self.packed_bytes + (group - 1) * self.expanded_bytes)


def costs(point: Config, spec: DatasetSpec) -> Costs:
    """The costs of a trial of `point` on a data set of that `spec`; no data, no compilation, no device.

    A convolution from C to O channels takes 2 v_h v_w C O FLOPs for its forward pass and for each of its
    two gradients (the first layer needs no input gradient), where v_h and v_w are the pairs of an output
    and a tap along the height and the width that fall inside the image; with all taps, v_h is outputs times
    taps.

    Args:
      point: its static values decide.
      spec: sizes of the data set.
    """
    batch, pixels = point.batch_size, math.prod(spec.shape)
    net = (_mlp if point.model == "mlp" else _resnet)(point, spec)
    parameters = parameters_count(point, spec)
    moments = _MOMENTS[point.optimizer]
    update = _UPDATE[point.optimizer] - 2 * moments * point.decoupled  # undecayed gradients for the moments
    step = net.products + net.elementwise + _LOSS * spec.classes

    value = 8 if point.compute_dtype == "float64" else 4
    computed = {"float64": 8, "float32": 4, "bfloat16": 2}[point.compute_dtype]
    n = sampler.train_size(spec.train_examples, point.train_examples, point.validation_fraction)
    held_back = sampler.validation_size(spec.train_examples, point.validation_fraction)
    statistics = 2 * net.channels if point.norm == "batch" else 0
    counters = 3 * 4 + 2 + (4 if point.optimizer == "adam" else 0)
    carried = value * ((1 + moments) * parameters + statistics) + 4 * n + counters
    state = carried + 4 * (3 * n + held_back)

    training = batch * (_KEPT[point.norm] * net.outputs * computed + pixels * value) + 4 * _ORDERS * n
    sizes = spec.test_examples, held_back, n
    evaluated, evenly = (
        max(core.evaluation_batch(size, batch, packed) for size in sizes) for packed in (False, net.convolutional)
    )
    image = net.alive * computed + pixels * value
    evaluation, between = evaluated * image, evenly * image
    activations = max(training, evaluation, 4 * _SORT * n)
    kept = _KEPT_PACKED[point.norm] if net.convolutional else _KEPT_MLP
    packed = int(batch * computed * (kept * net.outputs + pixels)) + (0 if net.convolutional else computed * parameters)

    resident, working = state + carried, state + value * parameters + activations
    return Costs(
        parameters=parameters,
        step_flops=float(batch * step + update * parameters),
        padded_step_flops=float(batch * net.padded),
        traffic_bytes=float(4 * batch * net.outputs * computed + 2 * value * (2 + moments) * parameters),
        evaluation_flops=float(net.forward + net.evaluation),
        state_bytes=state,
        activation_bytes=activations,
        trial_bytes=resident + working,
        dataset_bytes=(spec.train_examples + spec.test_examples) * (pixels + 4),
        resident_bytes=resident,
        working_bytes=working,
        packed_bytes=packed,
        between_bytes=max(between, 4 * _SORT * n),
        expanded_bytes=computed * parameters if net.convolutional else 0,
        convolutional=net.convolutional,
    )


@functools.lru_cache(maxsize=256)
def parameters_count(point: Config, spec: DatasetSpec) -> int:
    """Number of parameters: 11 173 962 for a ResNet of width 64, depth 2, BatchNorm, 10 classes and 3 channels."""
    point = point.replace(compute_dtype="float32")  # counts the same, also where JAX has no float64
    network = models.network(point, spec.shape, spec.classes, Form("mapped"))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.shapes()["params"]))


@dataclass
class _Tally:
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


def _mlp(point: Config, spec: DatasetSpec) -> _Tally:
    net, inputs = _Tally(point.norm, False), math.prod(spec.shape)
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


def _resnet(point: Config, spec: DatasetSpec) -> _Tally:
    net, apply = _Tally(point.norm, True), _APPLY[point.norm]
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
