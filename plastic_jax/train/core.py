"""The training core: what one trial does between two looks of the host, and the trial axis around it.

Everything here is written for *one* trial; `trial_axis.py` puts the trials of a batch side by side, shards them over
the devices and compiles.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from plastic_jax import models, sampler, streams
from plastic_jax.config import Config
from plastic_jax.data import Dataset
from plastic_jax.methods import optimisers

Tree = Any
EVALUATION_BATCH = 512


def resident(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays that stay on the device: uint8 images [n,H,W,C] and int32 labels [n] of both splits."""
    return {
        "train_images": dataset.train_images,
        "train_labels": dataset.train_labels.astype(np.int32),
        "test_images": dataset.test_images,
        "test_labels": dataset.test_labels.astype(np.int32),
    }


def normalise(images: jax.Array, dtype: Any) -> jax.Array:
    """uint8 [...] to floats of mean 0.5, standard deviation 0.5 a channel (A&A): (x / 255 - 0.5) / 0.5."""
    return (images.astype(dtype) / 255 - 0.5) / 0.5


class Core:
    """A program's pure functions for one trial; static values come from `point` and `shape` [H, W, C]."""

    def __init__(self, point: Config, shape: tuple[int, int, int], classes: int, convolution: str, mixes: bool = False):
        """`mixes`: compile for smooth transitions too, beside ordinary stages."""
        self.point, self.shape, self.mixes = point, shape, mixes
        self.module = models.build(
            point.model,
            width=point.width,
            depth=point.depth,
            norm=point.norm,
            initialisation=point.initialisation,
            compute_dtype=point.compute_dtype,
            classes=classes,
            convolution=convolution,
        )
        self.optimiser = optimisers.build(point.optimizer, point.decoupled, fused=convolution == "native")
        self.dtype = jnp.float64 if point.compute_dtype == "float64" else jnp.float32

    def init(self, seed: jax.Array) -> Tree:
        """A trial's state before its first stage; `order` is filled when a stage starts."""
        return self._drawn(streams.stream(seed, streams.INITIALISATION))

    def _drawn(self, key: jax.Array) -> Tree:
        variables = models.init(self.module, key, self.shape)
        params = variables["params"]
        return {
            "params": params,
            "batch_stats": variables["batch_stats"],
            "optimiser": self.optimiser.init(params),
            "step": jnp.int32(0),  # in this stage
            "epoch": jnp.int32(0),  # whole epochs of this stage
            "total": jnp.int32(0),  # steps over all stages
            "done": jnp.bool_(False),  # the stage ended by accuracy
            "diverged": jnp.bool_(False),
        }

    def place(self, trial: Tree, _: Tree) -> Tree:
        """Put the state `loaded` into the slots of `mask`."""
        take = trial["mask"]
        return {"state": jax.tree.map(lambda new, old: jnp.where(take, new, old), trial["loaded"], trial["state"])}

    def start(self, trial: Tree, _: Tree) -> Tree:
        """Give a slot its next node: a `fresh` one starts from the initialisation; `begin` starts a stage.

        What happens at a stage's start is named by the stage: optimiser state reset or carried, BatchNorm's
        statistics restarted or carried (contract 3), modules re-initialised, with their statistics and moments.
        `resume` lets a stage that ended by accuracy go on.
        """
        state, stage, begin = trial["state"], trial["stage"], trial["begin"]
        # A trial's first stage starts from the initialisation, and no other needs it: one draw serves both.
        first = streams.stream(stage["seed"], streams.INITIALISATION)
        later = streams.stream(stage["seed"], streams.INTERVENTION, stage["stream"])
        drawn = self._drawn(jnp.where(trial["fresh"], first, later))

        def either(flag: jax.Array, new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)

        state = either(trial["fresh"], dict(drawn, order=state["order"]), state)
        begun = dict(
            state,
            optimiser=either(stage["reset_optimizer"], drawn["optimiser"], state["optimiser"]),
            batch_stats=either(stage["restart_batch_stats"], drawn["batch_stats"], state["batch_stats"]),
            step=jnp.int32(0),
            epoch=jnp.int32(0),
            done=jnp.bool_(False),
            order=self._order(trial, jnp.int32(0)),
        )
        begun |= {k: _redraw(stage["redrawn"], drawn[k], begun[k]) for k in ("params", "batch_stats", "optimiser")}
        state = either(begin, begun, state)
        return {"state": dict(state, done=state["done"] & ~trial["resume"])}

    def chunk(self, trial: Tree, data: Tree) -> Tree:
        """Train to the end of epoch `target` or of the stage, then evaluate; a trial with nothing to do stands still.

        Returns {"state", "metrics"}: train figures are means over the last epoch's own batches.
        """
        stage, size = trial["stage"], trial["stage"]["size"]
        zeros = {"loss": jnp.zeros((), self.dtype), "correct": jnp.int32(0), "count": jnp.int32(0)}

        def going(state: Tree) -> jax.Array:
            return (state["epoch"] < trial["target"]) & ~state["done"] & ~state["diverged"]

        def epoch(carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            state, _ = carry
            now, order = state["epoch"], state["order"]
            following = self._order(trial, now + 1)
            end = ((now + 1) * size + self.point.batch_size - 1) // self.point.batch_size

            def step(inner: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
                moving, sums = inner
                local = sampler.batch(order, following, now, moving["step"], size, self.point.batch_size)
                if self.mixes:
                    local = jnp.where(stage["gamma"] >= 0, self._mixture(trial, moving["step"]), local)
                return self._step(moving, sums, trial, local, data)

            moving = {k: v for k, v in state.items() if k not in ("order", "epoch", "done")}
            moving, sums = jax.lax.while_loop(
                lambda inner: (inner[0]["step"] < end) & ~inner[0]["diverged"], step, (moving, zeros)
            )
            whole = ~(moving["diverged"] | ~_finite(moving["params"]))
            reached = sums["correct"] >= stage["accuracy"] * sums["count"].astype(self.dtype)
            moving.update(
                diverged=~whole,
                order=following,
                epoch=jnp.where(whole, now + 1, now),
                done=(stage["accuracy"] > 0) & reached & whole,
            )
            return moving, sums

        active = going(trial["state"])
        state, sums = jax.lax.while_loop(lambda c: going(c[0]), epoch, (trial["state"], zeros))
        count = jnp.maximum(sums["count"], 1).astype(self.dtype)
        metrics = {"train_loss": sums["loss"] / count, "train_accuracy": sums["correct"] / count}
        metrics |= jax.lax.cond(
            active, lambda: self._evaluations(state, trial, data), lambda: self._no_evaluations(trial)
        )
        for name in ("step", "epoch", "total", "done", "diverged"):
            metrics[name] = state[name]
        return {"state": state, "metrics": metrics}

    def fit(self, trial: Tree, data: Tree) -> jax.Array:
        """Accuracy over the stage's whole data set against the labels trained on, in evaluation mode."""
        sample = trial["sample"]
        n = sample["permutation"].shape[0]
        members = sample["permutation"]

        def measure() -> jax.Array:
            return self._evaluate(
                trial["state"], data["train_images"], sample["ids"][members], sample["labels"][members],
                trial["stage"]["size"], n,
            )[1]  # fmt: skip

        return jax.lax.cond(trial["wanted"], measure, lambda: jnp.zeros((), self.dtype))

    def _order(self, trial: Tree, epoch: jax.Array) -> jax.Array:
        stage = trial["stage"]
        return sampler.epoch_order(stage["seed"], stage["stream"], epoch, trial["sample"]["permutation"], stage["size"])

    def _mixture(self, trial: Tree, step: jax.Array) -> jax.Array:
        stage = trial["stage"]
        probability = sampler.transition_probability(stage["gamma"], step, stage["steps"])
        return sampler.mixture(
            stage["seed"],
            stage["stream"],
            step,
            trial["sample"]["permutation"],
            stage["prefix"],
            probability,
            self.point.batch_size,
        )

    def _step(self, state: Tree, sums: Tree, trial: Tree, local: jax.Array, data: Tree) -> tuple[Tree, Tree]:
        """One update on the examples `local` [B]; a non-finite loss freezes the trial instead (contract 6).

        The step that failed is counted, so that its row stands after the last good one.
        """
        stage, sample = trial["stage"], trial["sample"]
        images = normalise(data["train_images"][sample["ids"][local]], self.dtype)
        labels = sample["labels"][local]

        def loss(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            logits, updated = self.module.apply(
                {"params": params, "batch_stats": state["batch_stats"]}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, updated.get("batch_stats", {}))

        (value, (logits, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
        factor = optimisers.schedule_factor(self.point.schedule, state["step"], stage["steps"])
        rate, finite = stage["learning_rate"] * factor, jnp.isfinite(value)
        params, opt = self.optimiser.update(
            gradients, state["optimiser"], state["params"], rate, stage["weight_decay"], finite
        )
        stats = jax.tree.map(lambda a, b: jnp.where(finite, a, b), stats, state["batch_stats"])
        new = {"params": params, "batch_stats": stats, "optimiser": opt}
        correct = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
        state = dict(new, step=state["step"] + 1, total=state["total"] + 1, diverged=~finite)
        sums = {
            "loss": sums["loss"] + value * len(labels),
            "correct": sums["correct"] + correct,
            "count": sums["count"] + len(labels),
        }
        return state, sums

    def _evaluations(self, state: Tree, trial: Tree, data: Tree) -> Tree:
        tests = data["test_labels"].shape[0]
        loss, accuracy = self._evaluate(
            state, data["test_images"], jnp.arange(tests, dtype=jnp.int32), data["test_labels"], tests, tests
        )
        found = {"test_loss": loss, "test_accuracy": accuracy}
        held = trial["sample"]["held_back"]
        if held.shape[0]:
            loss, accuracy = self._evaluate(
                state, data["train_images"], held, data["train_labels"][held], held.shape[0], held.shape[0]
            )
            found |= {"validation_loss": loss, "validation_accuracy": accuracy}
        return found

    def _no_evaluations(self, trial: Tree) -> Tree:
        names = ["test_loss", "test_accuracy"]
        if trial["sample"]["held_back"].shape[0]:
            names += ["validation_loss", "validation_accuracy"]
        return {name: jnp.zeros((), self.dtype) for name in names}

    def _evaluate(
        self, state: Tree, images: jax.Array, ids: jax.Array, labels: jax.Array, count: jax.Array | int, most: int
    ) -> tuple[jax.Array, jax.Array]:
        """Mean loss and accuracy of the first `count` of `ids` [most], with running statistics (contract 8)."""
        batches = math.ceil(most / EVALUATION_BATCH)
        size = math.ceil(most / batches)
        pad = batches * size - most
        ids, labels = jnp.pad(ids, (0, pad)), jnp.pad(labels, (0, pad))
        variables = {"params": state["params"], "batch_stats": state["batch_stats"]}

        def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start = i * size
            those = jax.lax.dynamic_slice_in_dim(ids, start, size)
            truth = jax.lax.dynamic_slice_in_dim(labels, start, size)
            inputs = normalise(images[those], self.dtype)
            logits, _ = models.apply(self.module, variables, inputs, train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
            counted = start + jnp.arange(size, dtype=jnp.int32) < count
            hits = (logits.argmax(-1) == truth) & counted
            loss = jnp.where(counted, losses, jnp.zeros((), self.dtype)).sum()
            return sums[0] + loss, sums[1] + hits.sum(dtype=jnp.int32)

        zero = (jnp.zeros((), self.dtype), jnp.int32(0))
        loss, hits = jax.lax.fori_loop(0, batches, add, zero)
        total = jnp.asarray(count, self.dtype)
        return loss / total, hits.astype(self.dtype) / total


def _redraw(modules: jax.Array, new: Tree, old: Tree) -> Tree:
    """The leaves of `modules` [k] bool from `new`, the others bit for bit from `old` (the paper's figure 6).

    What is of no module, an optimiser's count of steps, is new where all modules are.
    """

    def choose(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        names = [str(getattr(entry, "key", "")) for entry in path]
        numbers = [int(name.removeprefix("module_")) for name in names if name.startswith("module_")]
        return jnp.where(modules[numbers[0] - 1] if numbers else modules.all(), a, b)

    return jax.tree.map_with_path(choose, new, old)


def _finite(tree: Tree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
