"""What interventions and diagnostics do in the core: when each is called, and what it gets to see."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from plastic_jax import models, streams
from plastic_jax.errors import InputError
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.methods.interventions import INTERVENTIONS, Intervention
from plastic_jax.methods.optimisers import Optimiser
from plastic_jax.methods.view import Trained, View
from plastic_jax.study.config import Config, diagnostics_named
from plastic_jax.train import trees
from plastic_jax.train.state import Data, Sample, Stage, State, Tree

MEASURED = 128  # examples that diagnostics see, at most


class Methods:
    """A program's interventions and diagnostics, for one trial."""

    def __init__(
        self,
        point: Config,
        interventions: Sequence[str],
        network: models.Network,
        optimiser: Optimiser,
        draw: Callable[[Array, Array], State],
    ):
        """`draw(key, order)` gives a trial's beginning."""
        self._point, self._network, self._optimiser, self._draw = point, network, optimiser, draw
        self._interventions = {name: INTERVENTIONS[name] for name in interventions}
        self._diagnostics = {name: DIAGNOSTICS[name] for name in diagnostics_named(point.diagnostics)}

    @property
    def columns(self) -> list[str]:
        """What the diagnostics fill."""
        return [column.name for method in self._diagnostics.values() for column in method.columns]

    def doing(self, what: str) -> list[tuple[str, Intervention]]:
        """The interventions that override `what`."""
        return [(name, method) for name, method in self._interventions.items() if method.does(what)]

    def remember(self, params: Tree) -> dict[str, Tree]:
        """What is kept from the initialisation on."""
        return {name: method.remember(params) for name, method in self.doing("remember")}

    def at_start(self, state: State, drawn: State, stage: Stage, later: Array) -> State:
        """The state at a stage's start; `later` says whether it is not the trial's first."""
        fresh = Trained(drawn.params, drawn.batch_stats, drawn.optimiser)
        for name, method in self.doing("at_start"):
            view = self._view(state, stage, name, state.memory, lambda: fresh)
            state = _changed(state, stage.acting[name] & later, method.at_start(view))
        return state

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
        model, params, stats = models.MODELS[self._point.model], state.params, state.batch_stats

        def anew() -> Trained:
            drawn = self._draw(streams.stream(stage.seed, streams.INTERVENTION, stage.stream, state.total), state.order)
            return Trained(drawn.params, drawn.batch_stats, drawn.optimiser)

        return View(
            trained=Trained(params, stats, state.optimiser),
            strengths=stage.strengths,
            key=key,
            step=state.total,
            fresh=fresh or anew,
            batch=batch or (lambda: _none("a batch", method)),
            hidden=lambda images: self._network.hidden(params, stats, images),
            units=model.units(self._point),
            point=self._point,
            optimiser=self._optimiser.transformation(),
            flax_layout=model.plain,
            memory=memory.get(method),
        )

    def on_gradients(
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

    def until(self, state: State) -> Array:
        """The step of the stage after which the next intervention acts."""
        waits = [k - state.total % k for k in (method.interval(self._point) for _, method in self.doing("at_interval"))]
        return state.step + jnp.stack(waits).min()

    def at_interval(
        self, state: State, stage: Stage, sample: Sample, examples: Callable[[Array], Array], data: Data, memory: Tree
    ) -> State:
        """What acts after every so many updates, where it is due: for none of a block it costs nothing."""

        def batch() -> tuple[Array, Array]:
            local = examples(state.step - 1)
            return data.train_images[sample.ids[local]], sample.labels[local]

        for name, method in self.doing("at_interval"):
            due = (state.total % method.interval(self._point) == 0) & ~state.diverged

            def act(method: Intervention = method, name: str = name, before: State = state, due: Array = due) -> State:
                view = self._view(before, stage, name, memory, batch=batch)
                return _changed(before, due, method.at_interval(view))

            state = jax.lax.cond(trees.some(due), act, lambda before=state: before)
        return state

    def measure(self, state: State, stage: Stage, sample: Sample, data: Data) -> dict[str, Array]:
        """What the diagnostics find, by column."""
        most = min(MEASURED, sample.permutation.shape[0])

        def batch() -> tuple[Array, Array]:
            local = sample.permutation[jnp.arange(most, dtype=jnp.int32) % stage.size]
            return data.train_images[sample.ids[local]], sample.labels[local]

        found: dict[str, Array] = {}
        for name, method in self._diagnostics.items():
            found |= method.measure(self._view(state, stage, name, {}, batch=batch))
        return {name: jnp.asarray(value, stage.learning_rate.dtype) for name, value in found.items()}


def _none(what: str, method: str) -> Any:
    raise InputError(f"{method} asks for {what} when a stage begins: there is none yet.")


def _changed(state: State, flag: Array, new: Trained) -> State:
    """The state with what an intervention made of it, if `flag` says so."""
    parts = {"params": new.params, "batch_stats": new.batch_stats, "optimiser": new.optimiser}
    return replace(state, **{name: trees.either(flag, part, getattr(state, name)) for name, part in parts.items()})
