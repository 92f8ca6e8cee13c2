"""The trial axis: how the trials of a batch are computed on a device, chosen in this one place.

`map` trains a device's trials one after another inside the compiled program: no trial waits for a longer one, and the
working set of one trial fits a CPU's cache. `vmap` batches them, in blocks of a fixed width, so that a trial's numbers
do not depend on how many others there are (wider batches give other rounding, measured). `unroll` writes the trials of
a block out one beside another, for the compiler to overlap. The rest of the code does not know which was taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plastic_jax.config import Sweep
from plastic_jax.kernels import native
from plastic_jax.train.costs import Costs

Tree = Any
BLOCKS = {"map": 1, "vmap": 8, "unroll": 4}
"""Trials that a device computes at a time, where nothing else is asked for."""


@dataclass(frozen=True)
class Formulation:
    """How a program's trials are computed: changes rounding, never the random draws (contract 1).

    `slots`: trials side by side over all devices. `block`: those that a device computes at a time (0: as `BLOCKS` has).
    """

    trial_axis: str  # vmap | map | unroll
    convolution: str  # plain | mended | products | native
    slots: int
    block: int = 0

    def __post_init__(self):
        object.__setattr__(self, "block", self.block or BLOCKS[self.trial_axis])

    def devices(self, available: int) -> int:
        """The most of the available devices that the slots can be shared out to in whole blocks."""
        return max(n for n in range(1, available + 1) if self.slots % (n * self.block) == 0)


@dataclass(frozen=True)
class Candidate:
    """A formulation before it is known how many trials there will be."""

    trial_axis: str
    convolution: str
    block: int

    def __str__(self) -> str:
        return f"{self.trial_axis}({self.block})/{self.convolution}" if self.block > 1 else f"map/{self.convolution}"


def candidates(sweep: Sweep, model: str, backend: str, measured: bool = False) -> tuple[Candidate, ...]:
    """What there is to choose from, the one that is taken unmeasured first; what the user has set is kept to.

    On a CPU trials go one after another, and convolutions are compiled by the machine's C++ compiler, or have gradients
    for XLA's loops where there is none. An MLP's layers are so only where it is to be `measured` if that pays, as a
    short run is over before they are compiled. Elsewhere nothing has been measured yet: MLPs are batched, convolutional
    nets run one after another with XLA's own convolution.

    Raises:
      InputError: where native convolutions are asked for, and cannot be had.
    """
    cpu, mlp = backend == "cpu", model == "mlp"
    if cpu:
        axes = [("map", 1), ("vmap", 8)] if mlp else [("map", 1)]
        convolutions = ["plain"] if mlp else ["products", "mended"]
        if sweep.convolution == "auto" and not mlp and native.available():
            convolutions = ["native", *convolutions]
    else:
        axes = [("vmap", 8), ("vmap", 32), ("map", 1)] if mlp else [("map", 1), ("unroll", 4), ("vmap", 8)]
        convolutions = ["plain"] if mlp else ["plain", "products"]
    if sweep.trial_axis != "auto":
        axes = [a for a in axes if a[0] == sweep.trial_axis] or [(sweep.trial_axis, BLOCKS[sweep.trial_axis])]
    if sweep.convolution == "native":
        native.require(backend)
    if sweep.convolution != "auto":
        convolutions = [sweep.convolution]
    found = tuple(Candidate(axis, convolution, block) for axis, block in axes for convolution in convolutions)
    if measured and cpu and mlp and sweep.convolution == "auto" and axes[0][0] == "map":
        found += (Candidate("map", "native", 1),) * native.available()
    return found


def formulation(
    choice: Candidate, sweep: Sweep, model: str, cost: Costs, *, leaves: int, memory: int, devices: int
) -> Formulation:
    """That choice for a program of `leaves` parallel trials on `devices` with `memory` bytes each."""
    block = choice.block
    # Mapped trials gain nothing from company but fewer looks of the host; short chunks want more of them.
    usual = 64 if block > 1 else 16 if model == "mlp" else 4
    blocks = -(-min(sweep.trials_per_device or usual, -(-leaves // devices)) // block)
    while blocks > 1 and cost.device_bytes(blocks * block, block) > memory:
        blocks -= 1
    return Formulation(choice.trial_axis, choice.convolution, blocks * block * min(devices, leaves), block)


class Batched:
    """A function over a batch of trials: call it, or `lower` it for XLA's analysis."""

    def __init__(self, compiled: Any, over: Mesh, block: int):
        self._compiled, self._over, self._block = compiled, over, block

    def _with_blocks(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        slots = jax.tree.leaves(arguments[0])[0].shape[0]
        return replicated(np.array([slots // self._over.size // self._block], np.int32), self._over), *arguments

    def __call__(self, *arguments: Any) -> Any:
        """The function's results, stacked."""
        return self._compiled(*self._with_blocks(arguments))

    def lower(self, *arguments: Any) -> Any:
        """JAX's lowered program for such arguments."""
        return self._compiled.lower(*self._with_blocks(arguments))


def over_trials(
    function: Callable[..., Any], axis: str, over: Mesh, donate: tuple[int, ...] = (), block: int = 0
) -> Batched:
    """`function(trial, shared)` for one trial, compiled for a batch.

    The returned function takes trees whose leaves are stacked on a leading trial axis, merged into the dict `trial`,
    and last the tree `shared`. The trial axis is sharded over the mesh; a device never waits for another inside.
    """
    block = block or BLOCKS[axis]

    def unrolled(trials: Tree, shared: Tree) -> Tree:
        done = [function(jax.tree.map(lambda leaf: leaf[i], trials), shared) for i in range(block)]  # noqa: B023
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)

    one = {"map": function, "vmap": jax.vmap(function, in_axes=(0, None)), "unroll": unrolled}[axis]
    single = axis == "map"

    def batched(blocks: jax.Array, *arguments: Any) -> Any:
        *stacks, shared = arguments
        trials = {k: v for tree in stacks for k, v in tree.items()}

        def take(i: jax.Array) -> Tree:
            part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * block, block)  # noqa: E731
            return jax.tree.map((lambda leaf: part(leaf)[0]) if single else part, trials)

        def body(i: jax.Array, out: Tree) -> Tree:
            def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(whole, new[None] if single else new, i * block, 0)

            # Barriers keep the slicing, whose form depends on the number of trials, out of a trial's own arithmetic.
            mine = jax.lax.optimization_barrier(take(i))
            return jax.tree.map(put, out, jax.lax.optimization_barrier(one(mine, shared)))

        count = jax.tree.leaves(trials)[0].shape[0]
        shapes = jax.eval_shape(lambda: one(take(jnp.int32(0)), shared))
        rest = (lambda s: s.shape) if single else (lambda s: s.shape[1:])
        out = jax.tree.map(lambda s: jnp.zeros((count, *rest(s)), s.dtype), shapes)
        # The number of blocks is traced: a loop of one known turn would be inlined, and rounded otherwise.
        return jax.lax.fori_loop(0, blocks[0], body, out)

    along, whole = PartitionSpec("trials"), PartitionSpec()

    def call(blocks: jax.Array, *arguments: Any) -> Any:
        specs = (whole, *[along] * (len(arguments) - 1), whole)
        sharded = jax.shard_map(batched, mesh=over, in_specs=specs, out_specs=along, check_vma=False)
        return sharded(blocks, *arguments)

    call.__name__ = function.__name__  # for profiles and compilation logs
    return Batched(jax.jit(call, donate_argnums=tuple(n + 1 for n in donate)), over, block)


def planned_bytes(lowered: Any) -> int:
    """What a lowered program needs on one device, as XLA has laid it out: arguments, results and temporaries."""
    found = lowered.compile().memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def mesh(devices: Sequence[Any]) -> Mesh:
    """A one-dimensional mesh whose axis is the trial axis."""
    return jax.make_mesh((len(devices),), ("trials",), devices=devices)


def sharded(tree: Tree, over: Mesh) -> Tree:
    """Host arrays with a leading trial axis, put on the mesh's devices.

    Copied first: a CPU device may otherwise share the host's memory, and the caller goes on writing into it.
    """
    own = jax.tree.map(np.array, tree)
    return jax.device_put(own, NamedSharding(over, PartitionSpec("trials")))


def replicated(tree: Tree, over: Mesh) -> Tree:
    """Host arrays, put whole on each of the mesh's devices."""
    return jax.device_put(tree, NamedSharding(over, PartitionSpec()))
