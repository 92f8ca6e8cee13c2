"""Training: a host loop over chunks that deals the nodes of a plan to the slots of a batch.

A slot trains one node after another. A chunk is one call of the compiled program, in which every slot runs to its own
next evaluation; its metrics are fetched while the next chunk runs. When a node ends, its first child goes on in the
slot and the others wait with a copy of its state. Which node runs where and beside whom changes no result (contract 1).
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plastic_jax import models, plan, sampler
from plastic_jax.config import SCHEDULES, STATIC, Config
from plastic_jax.data import Dataset
from plastic_jax.kernels import Form
from plastic_jax.plan import Node, ProgramPlan
from plastic_jax.results import replace_file
from plastic_jax.train import core, trial_axis
from plastic_jax.train.state import Beginning, Sample, Stage, resident
from plastic_jax.train.trial_axis import Formulation

Tree = Any
Records = dict[int, list[dict[str, Any]]]  # node -> its evaluations, in order


@dataclass
class Slot:
    """A place in the batch: its node (None: free), the epoch it has been sent to, and how the node gets its state."""

    node: int | None = None
    epoch: int = 0
    waiting: bool = False  # by accuracy: at the node's last epoch, until its metrics say how it ended
    source: int | None = None  # the stored state to load, -1 the slot's own, None a new trial
    dealt: bool = False  # has a node that the device does not know of yet


@dataclass
class Pending:
    """A chunk whose metrics have not been fetched."""

    metrics: Tree
    entries: list[tuple[int, int]]  # (slot, node)
    fits: list[tuple[int, jax.Array]] = field(default_factory=list)  # (slot, accuracies of all slots)


@dataclass(frozen=True)
class Compiled:
    """A program's functions over a batch of trials, compiled at their first call."""

    core: core.Core
    chunk: trial_axis.Batched
    start: trial_axis.Batched
    place: trial_axis.Batched
    fit: trial_axis.Batched


@lru_cache(maxsize=16)
def programs(
    static: Config,
    shape: tuple[int, int, int],
    classes: int,
    form: Form,
    mixes: bool,
    over: Mesh,
) -> Compiled:
    """Made, and so compiled, once in a process for equal static values; `programs.cache_clear()` forgets them."""
    one = core.Core(static, shape, classes, form, mixes)
    over_trials = trial_axis.over_trials
    return Compiled(
        one,
        over_trials(one.chunk, form.block, over, donate=(0,)),
        over_trials(one.start, form.block, over, donate=(0,)),
        over_trials(one.place, form.block, over, donate=(0,)),
        over_trials(one.fit, form.block, over),
    )


class ProgramRun:
    """One compiled program over its nodes. `step()` until it returns False; `records` is the outcome."""

    def __init__(
        self,
        program: ProgramPlan,
        dataset: Dataset,
        formulation: Formulation,
        devices: Sequence[Any],
        eval_every: int,
        keep: str = "none",
        stored: Tree | None = None,
    ):
        self.plan, self.dataset, self.formulation = program, dataset, formulation
        self.eval_every, self.keep = eval_every, keep
        self.nodes = program.nodes
        self.mesh = trial_axis.mesh(devices[: formulation.devices(len(devices))])
        static = Config(**{name: getattr(program.point, name) for name in STATIC})
        self._compiled = programs(
            static,
            dataset.spec.shape,
            dataset.spec.classes,
            formulation.form,
            program.mixes,
            self.mesh,
        )
        self.core = self._compiled.core
        self._data = trial_axis.replicated(resident(dataset), self.mesh)
        self._remaining = program.remaining()
        self._samples: dict[tuple[Any, ...], sampler.TrainSet] = {}
        self._sample_host = self._blank_sample()
        self._sample: Tree = None
        self._stage: Tree = None
        one = jax.eval_shape(lambda: self.core.init(jnp.uint32(0), self._sample_host.permutation.shape[1]))
        self.structure = jax.tree.structure(one)
        self.leaves = jax.tree.leaves(one)
        # From here on: all that a checkpoint holds.
        self.slots = [Slot() for _ in range(formulation.slots)]
        self.records: Records = {}
        self.ended: dict[int, bool] = {}  # node -> whether it ended by accuracy
        self.dead: set[int] = set()  # nodes that can't be trained: their trial diverged before
        self.store: dict[int, list[np.ndarray]] = {}  # node -> the state at its end, for children and for `keep`
        self.ready: list[tuple[int, int | None]] = []  # (node, source)
        self.held: list[tuple[int, int]] = []  # controls that wait for the trials they serve: (node, source)
        self._pending: Pending | None = None
        self._released: list[int] = []
        self._host: list[np.ndarray] | None = None  # the state, fetched
        self.steps_done = 0
        for node in self.nodes:
            if node.parent is None:
                self.ready.append((node.index, None))
        self._state = trial_axis.sharded(self._blank_state(), self.mesh)

    # The loop

    def step(self) -> bool:
        """Deal out nodes, run one chunk and take in the metrics of the one before; False when all is done."""
        self._deal()
        if not any(slot.node is not None for slot in self.slots):
            if self._pending is None:
                return False
            self.flush()
            return True
        before, self._pending = self._pending, None
        latest = self._run_chunk()
        self._take_in(before)
        self._pending = latest
        return True

    def flush(self) -> None:
        """Take in the metrics of the last chunk."""
        pending, self._pending = self._pending, None
        self._take_in(pending)

    def _deal(self) -> None:
        """Give free slots the ready node with the longest way to go, and tell the device."""
        self._release_controls()
        free = [i for i, slot in enumerate(self.slots) if slot.node is None]
        if free and self.ready:
            self.ready.sort(key=lambda r: (-self._remaining[r[0]], self.nodes[r[0]].stage.size, r[0]))
            for i in free:
                if not self.ready:
                    break
                node, source = self.ready.pop(0)
                self.slots[i] = Slot(node, self.nodes[node].first, source=source, dealt=True)
        dealt = [i for i, slot in enumerate(self.slots) if slot.dealt]
        if not dealt and self._stage is not None:
            return
        self._tell(dealt)

    def _tell(self, dealt: list[int]) -> None:
        loads = [i for i in dealt if self.slots[i].source not in (None, -1)]
        if loads:
            stack = [np.zeros((len(self.slots), *leaf.shape), leaf.dtype) for leaf in self.leaves]
            for i in loads:
                source = self.slots[i].source
                assert source is not None
                for whole, leaf in zip(stack, self.store[source], strict=True):
                    whole[i] = leaf
            mask = np.isin(np.arange(len(self.slots)), loads)
            loaded = jax.tree.unflatten(self.structure, stack)
            self._state = self._compiled.place(
                self._state, trial_axis.sharded(loaded, self.mesh), trial_axis.sharded(mask, self.mesh), None
            )
            self._host = None
        for i in dealt:
            node = self._node(i)
            self._set_sample(i, node)
            self.slots[i].dealt = False
        self._sample = trial_axis.sharded(self._sample_host, self.mesh)
        self._stage = trial_axis.sharded(self._stage_arrays(), self.mesh)
        if dealt:
            how = Beginning(*(np.zeros(len(self.slots), bool) for _ in range(3)))
            for i in dealt:
                node = self._node(i)
                how.fresh[i] = self.slots[i].source is None
                how.begin[i] = node.begins
                how.resume[i] = node.control
                self.slots[i].source = None
            how = trial_axis.sharded(how, self.mesh)
            self._state = self._compiled.start(self._state, self._stage, self._sample, how, None)
            self._host = None
            self._forget()

    def _run_chunk(self) -> Pending:
        target = np.zeros(len(self.slots), np.int32)
        entries, ended = [], []
        for i, slot in enumerate(self.slots):
            if slot.node is None or slot.waiting:
                continue
            node = self.nodes[slot.node]
            slot.epoch = node.boundary(slot.epoch, self.eval_every)
            target[i] = slot.epoch
            entries.append((i, slot.node))
            if slot.epoch == node.last:
                if node.stage.accuracy:
                    slot.waiting = True
                else:
                    ended.append(i)
        target = trial_axis.sharded(target, self.mesh)
        with jax.transfer_guard("disallow"):  # nothing but what is named above goes to the device
            self._state, metrics = self._compiled.chunk(self._state, self._stage, self._sample, target, self._data)
        self._host = None
        pending = Pending(metrics, entries)
        if ended:
            fits = self._fits(ended)
            pending.fits = [(i, fits) for i in ended]
            for i in ended:
                self._finish(i, by_accuracy=False)
        return pending

    def _take_in(self, pending: Pending | None) -> None:
        """Read a chunk's metrics into the records; move on trials that ended by accuracy or diverged."""
        if pending is None:
            return
        metrics = {k: np.asarray(v) for k, v in vars(jax.device_get(pending.metrics)).items() if v is not None}
        fits = {i: float(np.asarray(values)[i]) for i, values in pending.fits}
        for i, index in pending.entries:
            node = self.nodes[index]
            past = self.records.setdefault(index, [])
            if index in self.dead or (past and (past[-1]["done"] or past[-1]["diverged"])):
                continue
            record = {k: v[i].item() for k, v in metrics.items()}
            record["fit_accuracy"] = fits.get(i)
            self.steps_done += record["step"] - (past[-1]["step"] if past else self._first_step(node))
            past.append(record)
            self._released.append(index)
            if record["diverged"]:
                self._kill(index)
            elif node.stage.accuracy and (record["done"] or record["epoch"] == node.last):
                record["fit_accuracy"] = float(np.asarray(self._fits([i]))[i])
                self._finish(i, by_accuracy=record["done"])

    def _first_step(self, node: Node) -> int:
        if node.begins:
            return 0
        above = node.parent
        while above not in self.records:  # a stretch that was skipped: its stage had ended by accuracy
            assert above is not None
            above = self.nodes[above].parent
        return self.records[above][-1]["step"]

    # Ends of nodes

    def _finish(self, i: int, by_accuracy: bool) -> None:
        """End the node in slot `i`: hand its state on to its children."""
        index = self.slots[i].node
        assert index is not None
        self.slots[i] = Slot()
        self.ended[index] = by_accuracy
        heirs = sorted(self._heirs(index, by_accuracy), key=lambda c: -self._remaining[c])
        held = [c for c in heirs if self.nodes[c].control and self.nodes[c].closely]
        children = [c for c in heirs if c not in held]
        self.held += [(c, index) for c in held]
        if held or len(children) > 1 or self._kept(index):
            self.store[index] = [np.array(leaf[i]) for leaf in self._host_state()]
        if children:
            self.slots[i] = Slot(children[0], self.nodes[children[0]].first, source=-1, dealt=True)
            self.ready += [(c, index) for c in children[1:]]

    def _heirs(self, index: int, by_accuracy: bool) -> Iterator[int]:
        """The nodes that start where `index` ended; a stage that ended by accuracy skips its later stretches."""
        for c in self.nodes[index].children:
            child = self.nodes[c]
            if by_accuracy and not child.begins and not child.control:
                self.ended[c] = True
                yield from self._heirs(c, by_accuracy)
            else:
                yield c

    def _release_controls(self) -> None:
        """Let controls start whose served trials have all ended: only now is their length known."""
        for control, source in list(self.held):
            node = self.nodes[control]
            parts = [n.index for n in self.nodes if set(n.trials) & set(node.served)]
            if not all(map(self._settled, [source, *parts])):
                continue
            self.held.remove((control, source))
            updates = max((self.records[n][-1]["total"] for n in parts if n in self.records), default=0)
            last = self.records[source][-1]
            updates -= last["total"] - last["step"]  # of the fresh trial's own earlier stages
            node.first = last["epoch"]
            node.last = plan.control_epochs(updates, node.stage.size, node.trial.point.batch_size)
            if node.last > node.first:
                self.ready.append((control, source))

    def _settled(self, index: int) -> bool:
        """Whether a node has ended and its last metrics are there."""
        if index in self.dead:
            return True
        if index not in self.ended:
            return False
        found = self.records.get(index)  # none: a stretch that was skipped
        return self.ended[index] or (found is not None and found[-1]["epoch"] == self.nodes[index].last)

    def _kill(self, index: int) -> None:
        """A diverged trial leaves: its node and all that would come after."""
        below = [index]
        while below:
            node = below.pop()
            self.dead.add(node)
            below += self.nodes[node].children
        self.ready = [r for r in self.ready if r[0] not in self.dead]
        self.held = [h for h in self.held if h[0] not in self.dead]
        self.slots = [Slot() if slot.node in self.dead else slot for slot in self.slots]

    def _kept(self, index: int) -> bool:
        node = self.nodes[index]
        if self.keep == "none" or not node.ends or node.control:
            return False
        return self.keep == "stages" or node.final

    def _forget(self) -> None:
        """Let go of stored states that no node waits for, unless they are kept."""
        needed = {source for _, source in [*self.ready, *self.held] if source is not None}
        needed |= {s.source for s in self.slots if s.dealt and s.source is not None}
        for index in [n for n in self.store if n not in needed and not self._kept(n)]:
            del self.store[index]

    def _fits(self, slots: list[int]) -> jax.Array:
        wanted = np.isin(np.arange(len(self.slots)), slots)
        wanted = trial_axis.sharded(wanted, self.mesh)
        return self._compiled.fit(self._state, self._stage, self._sample, wanted, self._data)

    # Host arrays

    def _node(self, i: int) -> Node:
        index = self.slots[i].node
        assert index is not None
        return self.nodes[index]

    def _host_state(self) -> list[np.ndarray]:
        if self._host is None:
            self._host = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(self._state))]
        return self._host

    def _blank_state(self) -> Tree:
        stack = [np.zeros((self.formulation.slots, *leaf.shape), leaf.dtype) for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, stack)

    def _blank_sample(self) -> Sample:
        point, pool, slots = self.plan.point, self.dataset.spec.train_examples, self.formulation.slots
        n = sampler.train_size(pool, point.train_examples, point.validation_fraction)
        held = sampler.validation_size(pool, point.validation_fraction)
        return Sample(*(np.zeros((slots, size), np.int32) for size in (n, n, n, held)))

    def _set_sample(self, i: int, node: Node) -> None:
        point, seed, key = node.trial.point, node.trial.seed, node.trial.sample
        if key not in self._samples:
            self._samples[key] = sampler.train_set(
                seed,
                self.dataset.train_labels,
                self.dataset.spec.classes,
                train_examples=point.train_examples,
                validation_fraction=point.validation_fraction,
                label_noise=point.label_noise,
                nesting=point.nesting,
            )
        for name, whole in vars(self._sample_host).items():
            whole[i] = getattr(self._samples[key], name)

    def _stage_arrays(self) -> Stage:
        """The dynamic values of each slot's stage."""
        batch, real = self.plan.point.batch_size, np.dtype(self.core.dtype)
        kinds = {
            "seed": np.uint32, "stream": np.int32, "size": np.int32, "steps": np.int32, "learning_rate": real,
            "weight_decay": real, "accuracy": real, "restart_batch_stats": bool, "reset_optimizer": bool,
            "prefix": np.int32, "gamma": np.float32, "schedule": np.int32,
        }  # fmt: skip
        arrays = {name: np.zeros(len(self.slots), kind) for name, kind in kinds.items()}
        arrays["size"][:] = arrays["prefix"][:] = 1
        point = self.plan.point
        redrawn = np.zeros((len(self.slots), models.modules(point.model, point.depth)), bool)
        for i, slot in enumerate(self.slots):
            if slot.node is None:
                continue
            node = self.nodes[slot.node]
            for name, array in arrays.items():
                if name == "seed":
                    array[i] = node.trial.seed
                elif name == "schedule":
                    array[i] = SCHEDULES.index(node.trial.point.schedule)
                elif name == "steps":
                    array[i] = sampler.stage_steps(node.stage.size, node.stage.epochs, batch)
                else:
                    array[i] = max(1, node.stage.prefix) if name == "prefix" else getattr(node.stage, name)
            redrawn[i, [number - 1 for number in node.stage.redrawn]] = True
        return Stage(**arrays, redrawn=redrawn)

    def lower_chunk(self) -> Any:
        """The chunk's program as JAX lowers it, for XLA's analyses."""
        if self._stage is None:
            self._deal()
        target = trial_axis.sharded(np.zeros(len(self.slots), np.int32), self.mesh)
        return self._compiled.chunk.lower(self._state, self._stage, self._sample, target, self._data)

    def chunk_bytes(self) -> int:
        """What a chunk needs on one device."""
        return trial_axis.planned_bytes(self.lower_chunk())

    # What a checkpoint holds

    def snapshot(self) -> tuple[Tree, dict[str, Any]]:
        """All of the run between two chunks, as host copies: (arrays, JSON)."""
        self.flush()
        arrays: dict[str, Any] = {"state": _numbered([leaf.copy() for leaf in self._host_state()])}
        names = sorted(self.store)
        if names:
            arrays["store"] = _numbered(
                [np.stack(leaves) for leaves in zip(*(self.store[n] for n in names), strict=True)]
            )
        host = {
            "slots": [vars(slot) for slot in self.slots],
            "ready": self.ready,
            "held": self.held,
            "store": names,
            "ended": sorted(self.ended.items()),
            "dead": sorted(self.dead),
            "records": sorted(self.records.items()),
            "steps_done": self.steps_done,
            "reaches": self.plan.reaches(),
        }
        return arrays, copy.deepcopy(host)

    def resume(self, arrays: Tree, host: dict[str, Any]) -> None:
        """Go on from a snapshot of the same plan."""
        state = jax.tree.unflatten(self.structure, _listed(arrays["state"]))
        self._state = trial_axis.sharded(state, self.mesh)
        stacks = _listed(arrays.get("store", {}))
        self.store = {n: [np.array(stack[k]) for stack in stacks] for k, n in enumerate(host["store"])}
        self.slots = [Slot(**slot) for slot in host["slots"]]
        self.ready = [(node, source) for node, source in host["ready"]]
        self.ended = dict(host["ended"])
        self.dead = set(host["dead"])
        self.records = {int(k): v for k, v in host["records"]}
        self.steps_done = host["steps_done"]
        self.held = [(node, source) for node, source in host["held"]]
        self.plan.set_reaches(host["reaches"])
        for i, slot in enumerate(self.slots):
            if slot.node is not None:
                self._set_sample(i, self.nodes[slot.node])

    def write_kept(self, folder: Path) -> None:
        """Write the kept models: `models` by Orbax, leaves stacked, and which trials and stages they are."""
        from orbax.checkpoint import v1 as ocp

        names = [n for n in sorted(self.store) if self._kept(n) and n not in self.dead]
        if not names:
            return
        one = jax.tree.unflatten(self.structure, list(range(len(self.leaves))))
        places = jax.tree.leaves({"params": one.params, "batch_stats": one.batch_stats})
        ocp.save(
            folder / "models", _numbered([np.stack([self.store[n][p] for n in names]) for p in places]), overwrite=True
        )
        # A stage that ended by accuracy ended for all of its trials.
        index = [
            [(t, self.nodes[n].stage.name) for t in (self.nodes[n].trials if self.ended[n] else self.nodes[n].ends)]
            for n in names
        ]
        replace_file(folder / "index.json", json.dumps({"kernels": "OhwI", "models": index}).encode())

    def released(self) -> list[int]:
        """Nodes that got a new record since the last call, oldest first."""
        fresh, self._released = self._released, []
        return fresh


def _numbered(leaves: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{k:04d}": leaf for k, leaf in enumerate(leaves)}


def _listed(tree: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(tree[name]) for name in sorted(tree)]
