"""What a trial costs in FLOPs and bytes: read off its program, which is traced but neither compiled nor run.

So it holds for any model and optimiser, also a user's own, and for a device that is not there. FLOPs are counted by a
walk over the program as it is written (`count.py`): two for a multiply-add, only for the taps that fall inside the
image, and one for an addition, comparison or selection of one value. XLA then fuses cheap operations into every
consumer of their result, which computes them anew: the program that runs has up to a sixth more of them in the
narrowest networks, and less than 1 % in a ResNet-18 (JAX 0.10.2; `tests/test_costs_compiled.py` has the bounds).

Bytes are estimates, but for state and data: the compiler decides what to keep.
"""

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plastic_jax import kernels, models
from plastic_jax.data import DatasetSpec, sampler
from plastic_jax.kernels import Form
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.study.config import Config
from plastic_jax.train import core, count, inputs, memory
from plastic_jax.train.state import Data, Sample, Sums

# A packed block's step keeps so much of what a trial's step by itself does, but no more than so many times the outputs
# of its layers: a norm's gradient is computed from its input alone (read off programs that XLA compiled for an H100,
# JAX 0.10.2).
_PACKED, _PACKED_MOST = 0.8, 2.2
# XLA repeats some vectors to the size of an output ahead of a convolutional net's evaluation.
_AHEAD = 1.25
_SORT = 8  # int32 for each train example while an epoch's order is drawn: keys, numbers, their sorted copies
_ORDERS = 3  # int32 for each train example while an epoch runs: the next order, and both orders in one array


@dataclass(frozen=True)
class Costs:
    """FLOPs and bytes of one trial, unless a field says otherwise."""

    parameters: int
    step_flops: float
    """One training step at the trial's batch size: forward, backward, update, and the interventions that act in it."""
    padded_step_flops: float
    """Convolutions and linear layers of that step alone, with all taps: what utilisation figures use."""
    traffic_bytes: float
    """Least memory traffic of a training step: each layer's output written once, read once by the forward and twice
    by the backward pass, in `compute_dtype`; parameters and moments read and written, the gradient too."""
    evaluation_flops: float
    """Forward pass of one image in evaluation mode."""
    state_bytes: int
    """Exact: parameters, statistics, optimiser state, order, counters, and the view of the train set."""
    carried_bytes: int
    """Exact: the part of the state that a step may change, which is there before and after a chunk."""
    activation_bytes: int
    """Estimate: the temporaries of a step, of an evaluation batch or of drawing an order, whichever are most.

    A step keeps what comes out of its layers, and what JAX keeps for the backward pass. Counted in `compute_dtype`,
    which a CPU does not honour: it computes bfloat16 through float32.
    """
    step_bytes: int
    """Estimate: the temporaries of a step alone."""
    dataset_bytes: int
    """Exact: the resident data, once a device."""
    packed_bytes: int
    """Estimate: a trial's share of the temporaries of a block's step."""
    between_bytes: int
    """Estimate: the temporaries of an evaluation batch or of drawing an order in a block of several trials."""
    expanded_bytes: int
    """Estimate: a convolutional net's kernels in the type to compute in, of which a group of G trials side by side
    holds G times as much for each, zeros included."""
    convolutional: bool
    unread: tuple[str, ...]
    """What the FLOPs leave out, in words."""

    @property
    def trial_bytes(self) -> int:
        """Estimate: all that one trial needs besides the data set."""
        return self.device_bytes(1, 1) - self.dataset_bytes

    def device_bytes(self, slots: int, together: int, group: int = 1) -> int:
        """Estimate of all that a device needs.

        A slot holds its state before and after the chunk. What computes holds it once more; where blocks follow one
        another, also the slice that it started from; and in a block of several trials also what those that are done
        keep (measured: to 1 % of what XLA plans for wide perceptrons, for each optimiser).

        Args:
          slots: trials that are on the device.
          together: how many of them compute at a time: a form's `block`.
          group: how many of these are side by side in the channels.
        """
        block = min(slots, together)
        copies = 1 + (slots > block) + (block > 1)
        step = block * copies * self.carried_bytes + self.step_temporaries(block, group)
        between = self.activation_bytes if block == 1 else block * self.between_bytes
        between += block * (copies - 1) * self.carried_bytes
        return self.dataset_bytes + slots * (self.state_bytes + self.carried_bytes) + max(step, between)

    def step_temporaries(self, block: int, group: int) -> int:
        """Estimate of what a block's step holds beside its trials' states."""
        if block == 1:
            return self.step_bytes
        return block * (self.packed_bytes + (group - 1) * self.expanded_bytes)


def costs(point: Config, spec: DatasetSpec) -> Costs:
    """The costs of a trial of `point` on a data set of that `spec`; no data, no compilation, no device.

    Args:
      point: its static values decide, and which interventions it has.
      spec: sizes of the data set.
    """
    acting = tuple(name for name, method in INTERVENTIONS.items() if method.active(point))
    values = {name: getattr(point, name) for name in acting for name in INTERVENTIONS[name].fields}
    return _costs(point.compiled().replace(**values), spec, acting)


@functools.lru_cache(maxsize=256)
def _costs(point: Config, spec: DatasetSpec, acting: tuple[str, ...]) -> Costs:
    double = point.compute_dtype == "float64"
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        program = _Program(point, spec, acting)
        convolutional = models.MODELS[point.model].convolutional
        batch, pixels = point.batch_size, math.prod(spec.shape)
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))
        value = 8 if double else 4
        computed = {"float64": 8, "float32": 4, "bfloat16": 2}[point.compute_dtype]
        n, held_back = (leaf.shape[0] for leaf in (program.sample.permutation, program.sample.held_back))
        moments = _bytes(program.state.optimiser)

        images = batch * pixels
        training = (program.kept + program.outputs) * computed + images * value + 4 * _ORDERS * n
        sizes = spec.test_examples, held_back
        evaluated, evenly = (
            max(core.evaluation_batch(size, batch, packed) for size in sizes if size)
            for packed in (False, convolutional)
        )
        alive = int(program.alive * (_AHEAD if convolutional else 1))
        image = alive * computed + pixels * value
        evaluation, between, sort = evaluated * image, evenly * image, 4 * _SORT * n
        packed = min(_PACKED * (program.kept + program.outputs), _PACKED_MOST * program.outputs)
        return Costs(
            parameters=parameters,
            step_flops=program.step_flops,
            padded_step_flops=float(program.padded),
            traffic_bytes=float(4 * program.outputs * computed + 4 * value * parameters + 2 * moments),
            evaluation_flops=program.evaluation_flops,
            state_bytes=_bytes((program.state, program.sample)),
            carried_bytes=_bytes(program.state),
            activation_bytes=max(training, evaluation, sort),
            step_bytes=training,
            dataset_bytes=(spec.train_examples + spec.test_examples) * (pixels + 4),
            packed_bytes=int(computed * (packed + images)),
            between_bytes=max(between, sort),
            expanded_bytes=computed * parameters if convolutional else 0,
            convolutional=convolutional,
            unread=program.unread,
        )


def parameters_count(point: Config, spec: DatasetSpec) -> int:
    """Number of parameters: 11 173 962 for a ResNet of width 64, depth 2, BatchNorm, 10 classes and 3 channels."""
    return costs(point, spec).parameters


class _Program:
    """A trial's step and evaluation, in JAX's own operations, traced on shapes alone."""

    def __init__(self, point: Config, spec: DatasetSpec, acting: tuple[str, ...]):
        one = core.Core(point, spec.shape, spec.classes, Form("mapped"), interventions=acting)
        n = sampler.train_size(spec.train_examples, point.train_examples, point.validation_fraction)
        held_back = sampler.validation_size(spec.train_examples, point.validation_fraction)
        whole, some = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (n, held_back))
        self.sample = Sample(whole, whole, whole, some)
        self.state = jax.eval_shape(lambda: one.init(jnp.uint32(0), n))
        self._entered = kernels.of(one.network.form, 1, point.compute_dtype)
        self._step(one, point, spec, acting)
        self._training(one, (point.batch_size, *spec.shape))
        self._evaluation(one, (1, *spec.shape))

    def _step(self, one: core.Core, point: Config, spec: DatasetSpec, acting: tuple[str, ...]) -> None:
        stage = jax.tree.map(lambda leaf: leaf[0], inputs.stages([None], point, np.dtype(one.dtype), acting))
        state = replace(self.state, order=None, epoch=None, done=None)
        images = jax.ShapeDtypeStruct((spec.train_examples, *spec.shape), jnp.uint8)
        labels = jax.ShapeDtypeStruct((spec.train_examples,), jnp.int32)
        sums = Sums(*(jax.ShapeDtypeStruct((), kind) for kind in (one.dtype, jnp.int32, jnp.int32)))
        local = jax.ShapeDtypeStruct((point.batch_size,), jnp.int32)

        def step(state: Any, sums: Sums, sample: Sample, local: Any, data: Data) -> Any:
            return one.step(state, sums, stage, sample, local, data, state.memory)

        data = Data(images, labels, images, labels)
        jaxpr = jax.make_jaxpr(step)(state, sums, self.sample, local, data).jaxpr
        self.step_flops, self.unread = count.flops(jaxpr), count.unread(jaxpr)
        self.products = count.products(jaxpr)
        self.padded = sum(product.padded * product.times for product in self.products)

    def _training(self, one: core.Core, shape: tuple[int, ...]) -> None:
        """The forward pass in training, with what JAX keeps of it for the backward pass as its results."""

        def forward(params: Any, stats: Any, images: Any) -> Any:
            return jax.vjp(lambda own: one.network.block(own, stats, images, True)[0], params)[1]

        jaxpr, images = self._traced(forward, shape)
        self.outputs = sum(product.outputs * product.times for product in count.products(jaxpr)[:-1])
        self.kept = memory.kept(jaxpr, images)

    def _evaluation(self, one: core.Core, shape: tuple[int, ...]) -> None:
        def forward(params: Any, stats: Any, images: Any) -> Any:
            return one.network.block(params, stats, images, False)[0]

        entered = jax.make_jaxpr(lambda images: self._entered.enter(images).values)
        jaxpr, images = self._traced(forward, shape)
        bytes_entered = entered(jax.ShapeDtypeStruct(shape, jnp.uint8)).jaxpr
        self.evaluation_flops = count.flops(bytes_entered) + count.flops(jaxpr)
        self.unread = tuple(dict.fromkeys((*self.unread, *count.unread(jaxpr))))
        self.alive = memory.most_alive(jaxpr, images)

    def _traced(self, forward: Any, shape: tuple[int, ...]) -> tuple[Any, list[bool]]:
        """The jaxpr for a block of one trial, and which of its arguments are the images: as they enter the network."""
        stacked = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), (self.state.params, self.state.batch_stats)
        )
        jaxpr = jax.make_jaxpr(forward)(*stacked, jax.ShapeDtypeStruct((1, *shape), self._entered.dtype)).jaxpr
        return jaxpr, [n == len(jaxpr.invars) - 1 for n in range(len(jaxpr.invars))]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
