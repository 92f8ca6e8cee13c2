"""What a trial costs in FLOPs and bytes: read off its program, which is traced but neither compiled nor run.

So it holds for any model and optimiser, also a user's own, and for a device that is not there. FLOPs are those of XLA's
own analysis of the program as it is written: two for a multiply-add, only for the taps that fall inside the image, and
one for an addition, comparison or selection of one value. XLA then fuses cheap operations into every consumer of their
result, which computes them anew: the program that runs has up to a sixth more of them in the narrowest networks, and
less than 1 % in a ResNet-18 (JAX 0.10.2; `tests/test_costs.py` has the bounds).

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
from plastic_jax.train import core, count, inputs
from plastic_jax.train.state import Data, Sample, Sums

# Of each value that comes out of a convolution or linear layer before the head, so many wait for the backward pass:
# itself and the activation; with BatchNorm the value less its mean, with LayerNorm that and the normalised one. Read
# off programs that XLA compiled for a CPU.
_KEPT = {"none": 2, "batch": 3, "layer": 4}
# The same for packed blocks, read off programs that XLA compiled for an H100 (JAX 0.10.2): a norm's gradient is
# computed from its input alone.
_KEPT_PACKED = {"none": 1.6, "batch": 2.2, "layer": 2.2}
_KEPT_LINEAR = 0.8  # of networks without convolutions
# XLA repeats vectors to the size of an output ahead of a convolutional net's evaluation, but not LayerNorm's.
_AHEAD = {"none": 5 / 3, "batch": 5 / 3, "layer": 1}
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
        carried, state = _bytes(program.state), _bytes((program.state, program.sample))
        moments = _bytes(program.state.optimiser)

        training = batch * (_KEPT[point.norm] * program.outputs * computed + pixels * value) + 4 * _ORDERS * n
        sizes = spec.test_examples, held_back, n
        evaluated, evenly = (
            max(core.evaluation_batch(size, batch, packed) for size in sizes) for packed in (False, convolutional)
        )
        alive = int(program.alive * (_AHEAD[point.norm] if convolutional else 1))
        image = alive * computed + pixels * value
        evaluation, between = evaluated * image, evenly * image
        activations = max(training, evaluation, 4 * _SORT * n)
        kept = _KEPT_PACKED[point.norm] if convolutional else _KEPT_LINEAR
        packed = int(batch * computed * (kept * program.outputs + pixels))
        packed += 0 if convolutional else computed * parameters
        resident, working = state + carried, state + value * parameters + activations
        return Costs(
            parameters=parameters,
            step_flops=program.step_flops,
            padded_step_flops=float(program.padded),
            traffic_bytes=float(4 * batch * program.outputs * computed + 4 * value * parameters + 2 * moments),
            evaluation_flops=program.evaluation_flops,
            state_bytes=state,
            activation_bytes=activations,
            trial_bytes=resident + working,
            dataset_bytes=(spec.train_examples + spec.test_examples) * (pixels + 4),
            resident_bytes=resident,
            working_bytes=working,
            packed_bytes=packed,
            between_bytes=max(between, 4 * _SORT * n),
            expanded_bytes=computed * parameters if convolutional else 0,
            convolutional=convolutional,
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
        self._step(one, point, spec, acting)
        self._evaluation(one, spec)

    def _step(self, one: core.Core, point: Config, spec: DatasetSpec, acting: tuple[str, ...]) -> None:
        stage = jax.tree.map(lambda leaf: leaf[0], inputs.stages([None], point, np.dtype(one.dtype), acting))
        state = replace(self.state, order=None, epoch=None, done=None)
        images = jax.ShapeDtypeStruct((spec.train_examples, *spec.shape), jnp.uint8)
        labels = jax.ShapeDtypeStruct((spec.train_examples,), jnp.int32)
        sums = Sums(*(jax.ShapeDtypeStruct((), kind) for kind in (one.dtype, jnp.int32, jnp.int32)))
        local = jax.ShapeDtypeStruct((point.batch_size,), jnp.int32)

        def step(state: Any, sums: Sums, sample: Sample, local: Any, data: Data) -> Any:
            return one.step(state, sums, stage, sample, local, data, state.memory)

        traced = jax.jit(step).trace(state, sums, self.sample, local, Data(images, labels, images, labels))
        self.step_flops = float((traced.lower().cost_analysis() or {}).get("flops", 0.0))
        # A product and its gradients take the same taps inside; what there are with the padded ones, the first says.
        forward = list(count.products(self._forward(one, (point.batch_size, *spec.shape), train=True)))
        padded = {product.inside: product.padded for product in forward}
        self.products = list(count.products(traced.jaxpr.jaxpr))
        self.padded = sum(padded.get(product.inside, product.inside) for product in self.products)
        self.outputs = sum(product.outputs for product in forward[:-1]) // point.batch_size

    def _evaluation(self, one: core.Core, spec: DatasetSpec) -> None:
        params, stats = self.state.params, self.state.batch_stats
        images = jax.ShapeDtypeStruct((1, *spec.shape), jnp.uint8)
        lowered = jax.jit(one.network.logits).lower(params, stats, images)
        self.evaluation_flops = float((lowered.cost_analysis() or {}).get("flops", 0.0))
        # The images themselves are counted apart: here they come as they enter the network.
        entered = kernels.of(one.network.form, 1, one.point.compute_dtype).dtype
        program = self._forward(one, (1, *spec.shape), train=False, kind=entered)
        self.alive = count.most_alive(program, [k == len(program.invars) - 1 for k in range(len(program.invars))])

    def _forward(self, one: core.Core, shape: tuple[int, ...], train: bool, kind: Any = jnp.uint8) -> Any:
        def logits(params: Any, stats: Any, images: Any) -> Any:
            return one.network.block(params, stats, images, train)[0]

        stacked = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), (self.state.params, self.state.batch_stats)
        )
        return jax.make_jaxpr(logits)(*stacked, jax.ShapeDtypeStruct((1, *shape), kind)).jaxpr


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
