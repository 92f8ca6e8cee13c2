"""The training core: what one trial does in a chunk, between two evaluations.

Everything here is written for *one* trial. `trial_axis.py` puts the trials of a batch side by side, shards them over
the devices and compiles; `models/network.py` has the one boundary behind which a block of trials is computed as one.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from plastic_jax import kernels, models, streams
from plastic_jax.data import sampler
from plastic_jax.kernels import Form
from plastic_jax.methods import optimisers
from plastic_jax.methods.schedules import schedule_factor
from plastic_jax.study.config import Config
from plastic_jax.study.trial import NO_MIXTURE
from plastic_jax.train import trees
from plastic_jax.train.methods import Methods
from plastic_jax.train.state import Beginning, Data, Metrics, Sample, Stage, State, Sums, Tree

EVALUATION_BATCH = 512


def evaluation_batch(examples: int, batch_size: int, evenly: bool) -> int:
    """Images that pass through the network together: `evenly`, so many as in training, if that is no odd number."""
    if evenly and 64 <= batch_size <= min(examples, EVALUATION_BATCH):
        return batch_size
    return math.ceil(examples / max(1, math.ceil(examples / EVALUATION_BATCH)))


class Core:
    """A program's pure functions for one trial; static values come from `point` and `shape` [H, W, C]."""

    def __init__(
        self,
        point: Config,
        shape: tuple[int, int, int],
        classes: int,
        form: Form,
        mixes: bool = False,
        interventions: Sequence[str] = (),
    ):
        """`mixes`: compile for smooth transitions too, beside ordinary stages. `interventions`: with these."""
        self.point, self.mixes = point, mixes
        self.network = models.network(point, shape, classes, form)
        self.optimiser = optimisers.build(point.optimizer, fused=kernels.adam(form))
        self.methods = Methods(point, interventions, self.network, self.optimiser, self.draw)
        # On an accelerator each shape of a convolution is tuned before the first step: so training's shapes serve all.
        self.evenly = kernels.batched(form) and models.MODELS[point.model].convolutional
        self.dtype = jnp.float64 if point.compute_dtype == "float64" else jnp.float32

    def init(self, seed: Array, examples: int) -> State:
        """A trial's state before its first stage; `order` [examples] is filled when a stage starts."""
        order = jnp.zeros(examples, jnp.int32)
        return self.draw(streams.stream(seed, streams.INITIALISATION), order)

    def draw(self, key: Array, order: Array) -> State:
        """A trial's beginning."""
        params, batch_stats = self.network.init(key)
        zero, no = jnp.int32(0), jnp.bool_(False)
        memory = self.methods.remember(params)
        return State(params, batch_stats, self.optimiser.init(params), order, zero, zero, zero, no, no, memory)

    def place(self, state: State, loaded: State, mask: Array, _: Data | None) -> State:
        """Put the state `loaded` into the slots of `mask`."""
        return trees.either(mask, loaded, state)

    def start(self, state: State, stage: Stage, sample: Sample, how: Beginning, _: Data | None) -> State:
        """Give a slot its next node.

        What happens at a stage's start is named by the stage: optimiser state reset or carried, BatchNorm's
        statistics restarted or carried (contract 3), modules re-initialised, with their statistics and moments, and
        interventions.
        """
        # A trial's first stage starts from the initialisation, and no other needs it: one draw serves both.
        first = streams.stream(stage.seed, streams.INITIALISATION)
        later = streams.stream(stage.seed, streams.INTERVENTION, stage.stream)
        drawn = self.draw(jnp.where(how.fresh, first, later), state.order)
        state = trees.either(how.fresh, drawn, state)
        begun = replace(
            state,
            optimiser=trees.either(stage.reset_optimizer, drawn.optimiser, state.optimiser),
            batch_stats=trees.either(stage.restart_batch_stats, drawn.batch_stats, state.batch_stats),
            step=jnp.int32(0),
            epoch=jnp.int32(0),
            done=jnp.bool_(False),
            order=_order(stage, sample, jnp.int32(0)),
        )
        begun = replace(
            begun,
            params=trees.redraw(stage.redrawn, drawn.params, begun.params),
            batch_stats=trees.redraw(stage.redrawn, drawn.batch_stats, begun.batch_stats),
            optimiser=trees.redraw(stage.redrawn, drawn.optimiser, begun.optimiser),
        )
        begun = self.methods.at_start(begun, drawn, stage, ~how.fresh)
        state = trees.either(how.begin, begun, state)
        return replace(state, done=state.done & ~how.resume)

    def chunk(self, state: State, stage: Stage, sample: Sample, target: Array, data: Data) -> tuple[State, Metrics]:
        """Train to the end of epoch `target` or of the stage and evaluate; a trial with nothing to do stands still."""
        zeros = Sums(jnp.zeros((), self.dtype), jnp.int32(0), jnp.int32(0))

        def going(state: State) -> Array:
            return (state.epoch < target) & ~state.done & ~state.diverged

        def epoch(carry: tuple[State, Sums]) -> tuple[State, Sums]:
            state, _ = carry
            now, order = state.epoch, state.order
            following = _order(stage, sample, now + 1)
            end = ((now + 1) * stage.size + self.point.batch_size - 1) // self.point.batch_size

            def examples(step: Array) -> Array:
                local = sampler.batch(order, following, now, step, stage.size, self.point.batch_size)
                if self.mixes:
                    local = jnp.where(stage.gamma != NO_MIXTURE, self._mixture(stage, sample, step), local)
                return local

            def step(inner: tuple[State, Sums]) -> tuple[State, Sums]:
                return self.step(*inner, stage, sample, examples(inner[0].step), data, memory)

            def steps(inner: tuple[State, Sums], end: Array) -> tuple[State, Sums]:
                return jax.lax.while_loop(lambda now: (now[0].step < end) & ~now[0].diverged, step, inner)

            def stretch(inner: tuple[State, Sums]) -> tuple[State, Sums]:
                """To the next update after which an intervention acts: a step has no part in what acts between."""
                moving, sums = steps(inner, jnp.minimum(end, self.methods.until(inner[0])))
                return self.methods.at_interval(moving, stage, sample, examples, data, memory), sums

            # Nothing that a step leaves alone is carried.
            memory, moving = state.memory, replace(state, order=None, epoch=None, done=None, memory={})
            if self.methods.doing("at_interval"):
                moving, sums = jax.lax.while_loop(
                    lambda inner: (inner[0].step < end) & ~inner[0].diverged, stretch, (moving, zeros)
                )
            else:
                moving, sums = steps((moving, zeros), end)
            whole = ~moving.diverged & trees.finite(moving.params)
            reached = sums.correct >= stage.accuracy * sums.count.astype(self.dtype)
            moving = replace(
                moving,
                diverged=~whole,
                order=following,
                epoch=jnp.where(whole, now + 1, now),
                done=(stage.accuracy > 0) & reached & whole,
                memory=memory,
            )
            return moving, sums

        active = trees.some(going(state))
        state, sums = jax.lax.while_loop(lambda c: going(c[0]), epoch, (state, zeros))
        count = jnp.maximum(sums.count, 1).astype(self.dtype)
        held = sample.held_back
        nothing = (jnp.zeros((), self.dtype), jnp.zeros((), self.dtype))

        def evaluations() -> Any:
            tests = data.test_labels.shape[0]
            of_test = self._evaluate(
                state, data.test_images, jnp.arange(tests, dtype=jnp.int32), data.test_labels, tests
            )
            measured = self.methods.measure(state, stage, sample, data)
            if not held.shape[0]:
                return of_test, (None, None), measured
            of_held = self._evaluate(state, data.train_images, held, data.train_labels[held], held.shape[0])
            return of_test, of_held, measured

        unmeasured = dict.fromkeys(self.methods.columns, nothing[0])
        (test_loss, test), (validation_loss, validation), measured = jax.lax.cond(
            active, evaluations, lambda: (nothing, nothing if held.shape[0] else (None, None), unmeasured)
        )
        return state, Metrics(
            sums.loss / count, sums.correct / count, test_loss, test, validation_loss, validation,
            state.step, state.epoch, state.total, state.done, state.diverged, measured,
        )  # fmt: skip

    def fit(self, state: State, stage: Stage, sample: Sample, wanted: Array, data: Data) -> Array:
        """Accuracy over the stage's whole data set against the labels trained on, in evaluation mode."""
        members = sample.permutation

        def measure() -> Array:
            ids, labels = sample.ids[members], sample.labels[members]
            return self._evaluate(state, data.train_images, ids, labels, stage.size)[1]

        return jax.lax.cond(trees.some(wanted), measure, lambda: jnp.zeros((), self.dtype))

    def step(
        self, state: State, sums: Sums, stage: Stage, sample: Sample, local: Array, data: Data, memory: Tree = None
    ) -> tuple[State, Sums]:
        """One update on the examples `local` [B]; what is not finite freezes the trial instead (contract 6).

        That is its loss, its statistics, or a vector among its gradients and parameters: what goes wrong within the
        network shows in one of these, in the same step and without a pass over all parameters. The step that failed is
        counted, so that its row stands after the last good one. `memory` is what interventions remember.
        """
        images, labels = data.train_images[sample.ids[local]], sample.labels[local]
        found = self.network.gradients(state.params, state.batch_stats, images, labels)
        gradients, change = self.methods.on_gradients(found.gradients, state, stage, memory or {}, images, labels)
        factor = schedule_factor(stage.schedule, state.step, stage.steps)
        finite = jnp.isfinite(found.loss) & trees.vectors_finite((found.batch_stats, gradients, state.params))
        params, optimiser = self.optimiser.update(
            gradients, state.optimiser, state.params, stage.learning_rate * factor, finite, change
        )
        state = replace(
            state,
            params=params,
            batch_stats=trees.either(finite, found.batch_stats, state.batch_stats),
            optimiser=optimiser,
            step=state.step + 1,
            total=state.total + 1,
            diverged=~finite,
        )
        n = self.point.batch_size
        return state, Sums(sums.loss + found.loss * n, sums.correct + found.correct, sums.count + n)

    def _mixture(self, stage: Stage, sample: Sample, step: Array) -> Array:
        probability = sampler.transition_probability(stage.gamma, step, stage.steps)
        return sampler.mixture(
            stage.seed, stage.stream, step, sample.permutation, stage.prefix, probability, self.point.batch_size
        )

    def _evaluate(self, state: State, images: Array, ids: Array, labels: Array, count: Array | int) -> Any:
        """Mean loss and accuracy of the first `count` of `ids` [n], with running statistics (contract 8)."""
        most = ids.shape[0]
        size = evaluation_batch(most, self.point.batch_size, self.evenly)
        batches = math.ceil(most / size)
        pad = batches * size - most
        ids, labels = jnp.pad(ids, (0, pad)), jnp.pad(labels, (0, pad))

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            start = i * size
            those = jax.lax.dynamic_slice_in_dim(ids, start, size)
            truth = jax.lax.dynamic_slice_in_dim(labels, start, size)
            counted = start + jnp.arange(size, dtype=jnp.int32) < count
            loss, hits = self.network.evaluate(state.params, state.batch_stats, images[those], truth, counted)
            return sums[0] + loss, sums[1] + hits

        loss, hits = jax.lax.fori_loop(0, batches, add, (jnp.zeros((), self.dtype), jnp.int32(0)))
        total = jnp.asarray(count, self.dtype)
        return loss / total, hits.astype(self.dtype) / total


def _order(stage: Stage, sample: Sample, epoch: Array) -> Array:
    return sampler.epoch_order(stage.seed, stage.stream, epoch, sample.permutation, stage.size)
