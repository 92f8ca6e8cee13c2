"""Training: a host loop over chunks, which does on the devices what the schedule says.

A chunk is one call of the compiled program, in which every slot runs to its own next evaluation; its metrics are
fetched while the next chunk runs.
"""

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plastic_jax.data import Dataset
from plastic_jax.files import replace_file
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.study.plan import Node, ProgramPlan
from plastic_jax.train import core, inputs, trial_axis
from plastic_jax.train.schedule import Records, Schedule, Slot
from plastic_jax.train.state import Beginning, Stage, resident
from plastic_jax.train.trial_axis import Formulation

Tree = Any
SILENT = 2.0  # seconds of compiling from which on it is told


@dataclass
class Pending:
    """A chunk whose metrics have not been fetched."""

    metrics: Tree
    entries: list[tuple[int, int]]  # (slot, node)
    ended: list[int]  # slots whose node ended with it
    fits: jax.Array | None = None  # [slots], their accuracies


@dataclass(frozen=True)
class Compiled:
    """A program's functions over a batch of trials."""

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
    interventions: tuple[str, ...] = (),
) -> Compiled:
    """Made, and so compiled, once in a process for equal static values; `programs.cache_clear()` forgets them."""
    one = core.Core(static, shape, classes, form, mixes, interventions)
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
        say: Callable[[str], None] | None = None,
    ):
        """`say` is told what is being compiled, where that takes longer than `SILENT`."""
        self.plan, self.dataset, self.formulation = program, dataset, formulation
        self.nodes, self._say = program.nodes, say
        self.mesh = trial_axis.mesh(devices[: formulation.devices(len(devices))])
        shape, classes = dataset.spec.shape, dataset.spec.classes
        self._compiled = programs(
            program.point.compiled(), shape, classes, formulation.form, program.mixes, self.mesh, program.interventions
        )
        self.core = self._compiled.core
        self._data = trial_axis.replicated(resident(dataset), self.mesh)
        self._samples = inputs.Samples(program.point, dataset, formulation.slots)
        self._sample_host = self._samples.arrays
        self._sample: Tree = None
        self._stage: Tree = None
        one = jax.eval_shape(lambda: self.core.init(jnp.uint32(0), self._sample_host.permutation.shape[1]))
        self.structure = jax.tree.structure(one)
        self.leaves = jax.tree.leaves(one)
        # From here on: all that a checkpoint holds.
        slots, block = formulation.slots, formulation.block
        self.schedule = Schedule(program, slots, eval_every, block, self.mesh.size, keep)
        self.store: dict[int, list[np.ndarray]] = {}  # node -> the state at its end, for children and to be kept
        self._pending: Pending | None = None
        self._released: list[int] = []
        self._host: list[np.ndarray] | None = None  # the state, fetched
        self._state = trial_axis.sharded(self._blank_state(), self.mesh)

    @property
    def slots(self) -> list[Slot]:
        """The schedule's slots."""
        return self.schedule.slots

    @property
    def records(self) -> Records:
        """What each node recorded."""
        return self.schedule.records

    @property
    def steps_done(self) -> int:
        """Steps trained, of all nodes."""
        return self.schedule.steps_done

    # The loop

    def step(self) -> bool:
        """Deal out nodes, run one chunk and take in the metrics of the one before; False when all is done."""
        self._deal()
        if not self.schedule.active:
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

    def _compile(self) -> None:
        """Compile all that the run will call, side by side, but for what is compiled already."""
        stages = self._stages([None] * len(self.slots))
        flag, target = np.zeros(len(self.slots), bool), np.zeros(len(self.slots), np.int32)
        how = Beginning(flag, flag, flag)
        state, stage, sample, flag, target, how = (
            trial_axis.abstract(tree, self.mesh) for tree in (self._state, stages, self._sample_host, flag, target, how)
        )
        data = trial_axis.abstract(self._data, self.mesh, whole=True)
        wanted = {
            "chunk": (state, stage, sample, target, data),
            "start": (state, stage, sample, how, None),
            "fit": (state, stage, sample, flag, data),
        }
        if any(len(node.children) > 1 or node.control for node in self.nodes):  # states are stored and loaded
            wanted["place"] = (state, state, flag, None)
        functions = {name: getattr(self._compiled, name) for name in wanted}
        missing = {name: given for name, given in wanted.items() if not functions[name].knows(*given)}
        if not missing:
            return
        point, begin = self.plan.point, time.monotonic()
        words = f"{', '.join(missing)} of {point.model}, width {point.width}, {self.formulation.form}"
        telling = threading.Timer(SILENT, self._say or (lambda _: None), [f"Compiling {words} ..."])
        telling.start()
        try:
            # Traced here, since JAX's settings are a thread's own.
            lowered = {name: functions[name].lower(*given) for name, given in missing.items()}
            with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
                executables = pool.map(lambda one: one.compile(), lowered.values())
                for name, executable in zip(missing, executables, strict=True):
                    functions[name].keep(missing[name], executable)
        finally:
            telling.cancel()
        seconds = time.monotonic() - begin
        if self._say and seconds > SILENT:
            self._say(f"Compiled in {seconds:.0f} s.")

    def _deal(self) -> None:
        """Deal out nodes, and tell the device."""
        dealt = self.schedule.deal()
        if self._stage is None:
            self._compile()
        if dealt or self._stage is None:
            self._tell(dealt)

    def _stages(self, nodes: Sequence[Node | None]) -> Stage:
        return inputs.stages(nodes, self.plan.point, np.dtype(self.core.dtype), self.plan.interventions)

    def _tell(self, dealt: list[int]) -> None:
        nodes = [None if slot.node is None else self.nodes[slot.node] for slot in self.slots]
        loads = {i: source for i in dealt if (source := self.slots[i].source) is not None and source >= 0}
        if loads:
            stack = [np.zeros((len(self.slots), *leaf.shape), leaf.dtype) for leaf in self.leaves]
            for i, source in loads.items():
                for whole, leaf in zip(stack, self.store[source], strict=True):
                    whole[i] = leaf
            mask = np.isin(np.arange(len(self.slots)), list(loads))
            loaded = jax.tree.unflatten(self.structure, stack)
            self._state = self._compiled.place(
                self._state, trial_axis.sharded(loaded, self.mesh), trial_axis.sharded(mask, self.mesh), None
            )
            self._host = None
        given = {i: node for i in dealt if (node := nodes[i]) is not None}
        for i, node in given.items():
            self._samples.put(i, node)
        self._sample = trial_axis.sharded(self._sample_host, self.mesh)
        stages = self._stages(nodes)
        self._stage = trial_axis.sharded(stages, self.mesh)
        if given:
            how = Beginning(*(np.zeros(len(self.slots), bool) for _ in range(3)))
            for i, node in given.items():
                how.fresh[i] = self.slots[i].source is None
                how.begin[i] = node.begins
                how.resume[i] = node.control
                self.schedule.told(i)
            how = trial_axis.sharded(how, self.mesh)
            self._state = self._compiled.start(self._state, self._stage, self._sample, how, None)
            self._host = None
            needed = self.schedule.needed()
            self.store = {n: state for n, state in self.store.items() if n in needed or self.schedule.kept(n)}

    def _run_chunk(self) -> Pending:
        targets, entries, ended = self.schedule.send()
        target = trial_axis.sharded(np.array(targets, np.int32), self.mesh)
        with jax.transfer_guard("disallow"):  # nothing but what is named above goes to the device
            self._state, metrics = self._compiled.chunk(self._state, self._stage, self._sample, target, self._data)
        self._host = None
        pending = Pending(metrics, entries, ended)
        if ended:
            pending.fits = self._fits(ended)
            for i in ended:
                self._finish(i, by_accuracy=False)
        return pending

    def _take_in(self, pending: Pending | None) -> None:
        """Read a chunk's metrics into the records; move on trials that ended by accuracy or diverged."""
        if pending is None:
            return
        fetched = dict(vars(jax.device_get(pending.metrics)))
        fetched |= fetched.pop("diagnostics")
        metrics = {k: np.asarray(v) for k, v in fetched.items() if v is not None}
        fits = None if pending.fits is None else np.asarray(pending.fits)
        for i, index in pending.entries:
            if not self.schedule.awaits(index):
                continue
            record = {k: v[i].item() for k, v in metrics.items()}
            record["fit_accuracy"] = float(fits[i]) if fits is not None and i in pending.ended else None
            self._released.append(index)
            if self.schedule.take_in(index, record):
                record["fit_accuracy"] = float(np.asarray(self._fits([i]))[i])
                self._finish(i, by_accuracy=record["done"])

    def _finish(self, i: int, by_accuracy: bool) -> None:
        index = self.schedule.finish(i, by_accuracy)
        if index is not None:
            self.store[index] = [np.array(leaf[i]) for leaf in self._host_state()]

    def _fits(self, slots: list[int]) -> jax.Array:
        wanted = np.isin(np.arange(len(self.slots)), slots)
        wanted = trial_axis.sharded(wanted, self.mesh)
        return self._compiled.fit(self._state, self._stage, self._sample, wanted, self._data)

    # Host arrays

    def _host_state(self) -> list[np.ndarray]:
        if self._host is None:
            self._host = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(self._state))]
        return self._host

    def _blank_state(self) -> Tree:
        stack = [np.zeros((self.formulation.slots, *leaf.shape), leaf.dtype) for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, stack)

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
        return arrays, {"store": names, **self.schedule.snapshot()}

    def fits(self, arrays: Tree, host: dict[str, Any]) -> bool:
        """Whether a snapshot has states like this program's, leaf by leaf."""

        def kinds(leaves: Sequence[Any]) -> list[tuple[tuple[int, ...], str]]:
            return [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves]

        own = [((self.formulation.slots, *shape), dtype) for shape, dtype in kinds(self.leaves)]
        same = kinds(_listed(arrays["state"])) == own and len(host["slots"]) == len(self.slots)
        stored = [((len(host["store"]), *shape), dtype) for shape, dtype in kinds(self.leaves)]
        return same and (not host["store"] or kinds(_listed(arrays["store"])) == stored)

    def resume(self, arrays: Tree, host: dict[str, Any]) -> None:
        """Continue from a snapshot of the same plan, which `fits`."""
        state = jax.tree.unflatten(self.structure, _listed(arrays["state"]))
        self._state = trial_axis.sharded(state, self.mesh)
        stacks = _listed(arrays.get("store", {}))
        self.store = {n: [np.array(stack[k]) for stack in stacks] for k, n in enumerate(host["store"])}
        self.schedule.restore(host)
        for i, slot in enumerate(self.slots):
            if slot.node is not None:
                self._samples.put(i, self.nodes[slot.node])

    def write_kept(self, folder: Path) -> None:
        """Write the kept models: `models` by Orbax, leaves stacked, and which trials and stages they are."""
        from orbax.checkpoint import v1 as ocp

        schedule = self.schedule
        names = [n for n in sorted(self.store) if schedule.kept(n) and n not in schedule.dead]
        if not names:
            return
        one = jax.tree.unflatten(self.structure, list(range(len(self.leaves))))
        places = jax.tree.leaves({"params": one.params, "batch_stats": one.batch_stats})
        ocp.save(
            folder / "models", _numbered([np.stack([self.store[n][p] for n in names]) for p in places]), overwrite=True
        )
        # A stage that ended by accuracy ended for all of its trials.
        index = [
            [(t, self.nodes[n].stage.name) for t in (self.nodes[n].trials if schedule.ended[n] else self.nodes[n].ends)]
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
