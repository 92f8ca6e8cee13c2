"""The training core: what one trial does between two looks of the host.

Everything here is written for *one* trial. `trial_axis.py` puts the trials of a batch side by side, shards them over
the devices and compiles; `models/network.py` has the one boundary behind which a block of trials is computed as one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from plastic_jax import kernels, models, streams
from plastic_jax.data import sampler
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.methods import optimisers
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.methods.interventions import INTERVENTIONS, Intervention
from plastic_jax.methods.schedules import schedule_factor
from plastic_jax.methods.view import Trained, View
from plastic_jax.study.config import Config, diagnostics_named
from plastic_jax.study.trial import NO_MIXTURE
from plastic_jax.train.state import Beginning, Data, Metrics, Sample, Stage, State, Sums, Tree

EVALUATION_BATCH = 512
MEASURED = 128  # examples that diagnostics see, at most


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
        self.interventions = {name: INTERVENTIONS[name] for name in interventions}
        self.diagnostics = [DIAGNOSTICS[name] for name in diagnostics_named(point.diagnostics)]
        # On an accelerator each shape of a convolution is tuned before the first step: so training's shapes serve all.
        self.evenly = kernels.batched(form) and models.MODELS[point.model].convolutional
        self.dtype = jnp.float64 if point.compute_dtype == "float64" else jnp.float32

    def init(self, seed: Array, examples: int) -> State:
        """A trial's state before its first stage; `order` [examples] is filled when a stage starts."""
        order = jnp.zeros(examples, jnp.int32)
        return self._drawn(streams.stream(seed, streams.INITIALISATION), order)

    def _drawn(self, key: Array, order: Array) -> State:
        params, batch_stats = self.network.init(key)
        zero, no = jnp.int32(0), jnp.bool_(False)
        memory = {name: method.remember(params) for name, method in self.doing("remember")}
        return State(params, batch_stats, self.optimiser.init(params), order, zero, zero, zero, no, no, memory)

    def doing(self, what: str) -> list[tuple[str, Intervention]]:
        """The program's interventions that override `what`."""
        return [(name, method) for name, method in self.interventions.items() if method.does(what)]

    def place(self, state: State, loaded: State, mask: Array, _: Data | None) -> State:
        """Put the state `loaded` into the slots of `mask`."""
        return _either(mask, loaded, state)

    def start(self, state: State, stage: Stage, sample: Sample, how: Beginning, _: Data | None) -> State:
        """Give a slot its next node.

        What happens at a stage's start is named by the stage: optimiser state reset or carried, BatchNorm's
        statistics restarted or carried (contract 3), modules re-initialised, with their statistics and moments, and
        interventions.
        """
        # A trial's first stage starts from the initialisation, and no other needs it: one draw serves both.
        first = streams.stream(stage.seed, streams.INITIALISATION)
        later = streams.stream(stage.seed, streams.INTERVENTION, stage.stream)
        drawn = self._drawn(jnp.where(how.fresh, first, later), state.order)
        state = _either(how.fresh, drawn, state)
        begun = replace(
            state,
            optimiser=_either(stage.reset_optimizer, drawn.optimiser, state.optimiser),
            batch_stats=_either(stage.restart_batch_stats, drawn.batch_stats, state.batch_stats),
            step=jnp.int32(0),
            epoch=jnp.int32(0),
            done=jnp.bool_(False),
            order=_order(stage, sample, jnp.int32(0)),
        )
        begun = replace(
            begun,
            params=_redraw(stage.redrawn, drawn.params, begun.params),
            batch_stats=_redraw(stage.redrawn, drawn.batch_stats, begun.batch_stats),
            optimiser=_redraw(stage.redrawn, drawn.optimiser, begun.optimiser),
        )
        fresh = Trained(drawn.params, drawn.batch_stats, drawn.optimiser)
        for name, method in self.doing("at_start"):
            view = self._view(begun, stage, name, begun.memory, lambda: fresh)
            begun = _changed(begun, stage.acting[name] & ~how.fresh, method.at_start(view))
        state = _either(how.begin, begun, state)
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
                moving, sums = steps(inner, jnp.minimum(end, self._until(inner[0])))
                return self._at_interval(moving, stage, sample, examples, data, memory), sums

            # Nothing that a step leaves alone is carried.
            memory, moving = state.memory, replace(state, order=None, epoch=None, done=None, memory={})
            if self.doing("at_interval"):
                moving, sums = jax.lax.while_loop(
                    lambda inner: (inner[0].step < end) & ~inner[0].diverged, stretch, (moving, zeros)
                )
            else:
                moving, sums = steps((moving, zeros), end)
            whole = ~moving.diverged & _finite(moving.params)
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

        active = _some(going(state))
        state, sums = jax.lax.while_loop(lambda c: going(c[0]), epoch, (state, zeros))
        count = jnp.maximum(sums.count, 1).astype(self.dtype)
        held = sample.held_back
        nothing = (jnp.zeros((), self.dtype), jnp.zeros((), self.dtype))

        def evaluations() -> Any:
            tests = data.test_labels.shape[0]
            of_test = self._evaluate(
                state, data.test_images, jnp.arange(tests, dtype=jnp.int32), data.test_labels, tests
            )
            measured = self._measure(state, stage, sample, data)
            if not held.shape[0]:
                return of_test, (None, None), measured
            of_held = self._evaluate(state, data.train_images, held, data.train_labels[held], held.shape[0])
            return of_test, of_held, measured

        unmeasured = {column.name: nothing[0] for method in self.diagnostics for column in method.columns}
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

        return jax.lax.cond(_some(wanted), measure, lambda: jnp.zeros((), self.dtype))

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
        gradients, change = self._intervened(found.gradients, state, stage, memory or {}, images, labels)
        factor = schedule_factor(stage.schedule, state.step, stage.steps)
        finite = jnp.isfinite(found.loss) & _vectors_finite((found.batch_stats, gradients, state.params))
        params, optimiser = self.optimiser.update(
            gradients, state.optimiser, state.params, stage.learning_rate * factor, finite, change
        )
        state = replace(
            state,
            params=params,
            batch_stats=_either(finite, found.batch_stats, state.batch_stats),
            optimiser=optimiser,
            step=state.step + 1,
            total=state.total + 1,
            diverged=~finite,
        )
        n = self.point.batch_size
        return state, Sums(sums.loss + found.loss * n, sums.correct + found.correct, sums.count + n)

    # Interventions and diagnostics

    def _view(
        self,
        state: State,
        stage: Stage,
        method: str,
        memory: Tree,
        fresh: Callable[[], Trained] | None = None,
        batch: Callable[[], tuple[Array, Array]] | None = None,
    ) -> View:
        key = streams.stream(stage.seed, f"{streams.METHOD} {method}", stage.stream, state.total)
        model, params, stats = models.MODELS[self.point.model], state.params, state.batch_stats

        def anew() -> Trained:
            drawn = self._drawn(
                streams.stream(stage.seed, streams.INTERVENTION, stage.stream, state.total), state.order
            )
            return Trained(drawn.params, drawn.batch_stats, drawn.optimiser)

        return View(
            trained=Trained(params, stats, state.optimiser),
            strengths=stage.strengths,
            key=key,
            step=state.total,
            fresh=fresh or anew,
            batch=batch or (lambda: _none("a batch", method)),
            hidden=lambda images: self.network.hidden(params, stats, images),
            units=model.units(self.point),
            point=self.point,
            optimiser=self.optimiser.transformation(),
            flax_layout=model.plain,
            memory=memory.get(method),
        )

    def _intervened(
        self, gradients: Tree, state: State, stage: Stage, memory: Tree, images: Array, labels: Array
    ) -> tuple[Tree, Callable[[Tree], Tree] | None]:
        """The gradient that the optimiser gets, and what is done to its update."""

        def view(name: str) -> View:
            return self._view(state, stage, name, memory, batch=lambda: (images, labels))

        for name, method in self.doing("penalty"):
            more = jax.grad(method.penalty)(state.params, view(name))
            gradients = jax.tree.map(jnp.add, gradients, more)
        for name, method in self.doing("gradient"):
            gradients = method.gradient(gradients, view(name))

        def change(update: Tree) -> Tree:
            for name, method in self.doing("update"):
                update = method.update(update, view(name))
            return update

        return gradients, change if self.doing("update") else None

    def _until(self, state: State) -> Array:
        """The step of the stage after which the next intervention acts."""
        waits = [k - state.total % k for k in (method.interval(self.point) for _, method in self.doing("at_interval"))]
        return state.step + jnp.stack(waits).min()

    def _at_interval(
        self, state: State, stage: Stage, sample: Sample, examples: Callable[[Array], Array], data: Data, memory: Tree
    ) -> State:
        """What acts after every so many updates, where it is due: for none of a block it costs nothing."""

        def batch() -> tuple[Array, Array]:
            local = examples(state.step - 1)
            return data.train_images[sample.ids[local]], sample.labels[local]

        for name, method in self.doing("at_interval"):
            due = (state.total % method.interval(self.point) == 0) & ~state.diverged

            def act(method: Intervention = method, name: str = name, before: State = state, due: Array = due) -> State:
                view = self._view(before, stage, name, memory, batch=batch)
                return _changed(before, due, method.at_interval(view))

            state = jax.lax.cond(_some(due), act, lambda before=state: before)
        return state

    def _measure(self, state: State, stage: Stage, sample: Sample, data: Data) -> dict[str, Array]:
        """What the diagnostics find, by column."""
        most = min(MEASURED, sample.permutation.shape[0])

        def batch() -> tuple[Array, Array]:
            local = sample.permutation[jnp.arange(most, dtype=jnp.int32) % stage.size]
            return data.train_images[sample.ids[local]], sample.labels[local]

        found: dict[str, Array] = {}
        for method in self.diagnostics:
            found |= method.measure(self._view(state, stage, type(method).__name__, {}, batch=batch))
        return {name: jnp.asarray(value, self.dtype) for name, value in found.items()}

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


@custom_vmap
def _some(flag: Array) -> Array:
    """The flag; of a block of trials, whether it is set for any: what none of them needs is not computed."""
    return flag


@_some.def_vmap
def _(_: int, __: Any, flags: Array) -> tuple[Array, bool]:
    return flags.any(), False


def _order(stage: Stage, sample: Sample, epoch: Array) -> Array:
    return sampler.epoch_order(stage.seed, stage.stream, epoch, sample.permutation, stage.size)


def _none(what: str, method: str) -> Any:
    raise InputError(f"{method} asks for {what} when a stage begins: there is none yet.")


def _changed(state: State, flag: Array, new: Trained) -> State:
    """The state with what an intervention made of it, if `flag` says so."""
    parts = {"params": new.params, "batch_stats": new.batch_stats, "optimiser": new.optimiser}
    return replace(state, **{name: _either(flag, part, getattr(state, name)) for name, part in parts.items()})


def _either(flag: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def _redraw(modules: Array, new: Tree, old: Tree) -> Tree:
    """The leaves of `modules` [k] bool from `new`, the others bit for bit from `old` (the paper's figure 6).

    What is of no module, an optimiser's count of steps, is new where all modules are.
    """

    def choose(path: Any, a: Array, b: Array) -> Array:
        names = [str(getattr(entry, "key", "")) for entry in path]
        numbers = [int(name.removeprefix("module_")) for name in names if name.startswith("module_")]
        return jnp.where(modules[numbers[0] - 1] if numbers else modules.all(), a, b)

    return jax.tree.map_with_path(choose, new, old)


def _vectors_finite(tree: Tree) -> Array:
    """Whether all leaves of one axis are: statistics, scales, biases and their gradients."""
    vectors = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 1]
    return jnp.isfinite(jnp.concatenate(vectors)).all() if vectors else jnp.bool_(True)


def _finite(tree: Tree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
