"""The trial axis: how the trials of a batch are computed on a device, chosen in this one place.

`map` trains a device's trials one after another inside the compiled program: no trial waits for a longer one, and the
working set of one trial fits a CPU's cache. `vmap` batches them, in blocks of a fixed width, so that a trial's numbers
do not depend on how many others there are (wider batches give other rounding, measured). The rest of the code does
not know which was taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plastic_jax.config import Config, Sweep
from plastic_jax.costs import Costs

Tree = Any
BLOCK = 8  # trials of a vmapped block


@dataclass(frozen=True)
class Formulation:
    """How a program's trials are computed: changes rounding, never the random draws (contract 1).

    `slots`: trials side by side over all devices.
    """

    trial_axis: str  # vmap | map
    convolution: str  # plain | mended
    slots: int

    @property
    def block(self) -> int:
        """Trials that a device computes at a time."""
        return BLOCK if self.trial_axis == "vmap" else 1

    def devices(self, available: int) -> int:
        """The most of the available devices that the slots can be shared out to in whole blocks."""
        return max(n for n in range(1, available + 1) if self.slots % (n * self.block) == 0)


def choose(
    sweep: Sweep, point: Config, cost: Costs, *, leaves: int, memory: int, devices: int, backend: str
) -> Formulation:
    """The formulation for a program of `leaves` parallel trials on `devices` with `memory` bytes each.

    On a CPU one trial after another with the mended convolution; elsewhere MLPs are batched and convolutional nets
    run one after another with the backend's own convolution (not measured there).
    """
    cpu = backend == "cpu"
    axis = sweep.trial_axis
    if axis == "auto":
        axis = "vmap" if point.model == "mlp" and not cpu else "map"
    convolution = sweep.convolution
    if convolution == "auto":
        convolution = "mended" if cpu else "plain"
    block = BLOCK if axis == "vmap" else 1
    # Mapped trials gain nothing from company but fewer looks of the host; short chunks want more of them.
    usual = 64 if axis == "vmap" else 16 if point.model == "mlp" else 4
    blocks = -(-min(sweep.trials_per_device or usual, -(-leaves // devices)) // block)
    while blocks > 1 and cost.device_bytes(blocks * block, block) > memory:
        blocks -= 1
    return Formulation(axis, convolution, blocks * block * min(devices, leaves))


def over_trials(function: Callable[..., Any], axis: str, over: Mesh, donate: tuple[int, ...] = ()) -> Callable:
    """`function(trial, shared)` for one trial, compiled for a batch.

    The returned function takes trees whose leaves are stacked on a leading trial axis, merged into the dict `trial`,
    and last the tree `shared`. The trial axis is sharded over the mesh; a device never waits for another inside.
    """
    block = BLOCK if axis == "vmap" else 1
    one = jax.vmap(function, in_axes=(0, None)) if axis == "vmap" else function

    def batched(blocks: jax.Array, *arguments: Any) -> Any:
        *stacks, shared = arguments
        trials = {k: v for tree in stacks for k, v in tree.items()}

        def take(i: jax.Array) -> Tree:
            part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * block, block)  # noqa: E731
            return jax.tree.map(part if axis == "vmap" else lambda leaf: part(leaf)[0], trials)

        def body(i: jax.Array, out: Tree) -> Tree:
            def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(whole, new if axis == "vmap" else new[None], i * block, 0)

            # Barriers keep the slicing, whose form depends on the number of trials, out of a trial's own arithmetic.
            mine = jax.lax.optimization_barrier(take(i))
            return jax.tree.map(put, out, jax.lax.optimization_barrier(one(mine, shared)))

        count = jax.tree.leaves(trials)[0].shape[0]
        shapes = jax.eval_shape(lambda: one(take(jnp.int32(0)), shared))
        rest = (lambda s: s.shape[1:]) if axis == "vmap" else (lambda s: s.shape)
        out = jax.tree.map(lambda s: jnp.zeros((count, *rest(s)), s.dtype), shapes)
        # The number of blocks is traced: a loop of one known turn would be inlined, and rounded otherwise.
        return jax.lax.fori_loop(0, blocks[0], body, out)

    along, whole = PartitionSpec("trials"), PartitionSpec()

    def call(blocks: jax.Array, *arguments: Any) -> Any:
        specs = (whole, *[along] * (len(arguments) - 1), whole)
        sharded = jax.shard_map(batched, mesh=over, in_specs=specs, out_specs=along, check_vma=False)
        return sharded(blocks, *arguments)

    call.__name__ = function.__name__  # for profiles and compilation logs
    compiled = jax.jit(call, donate_argnums=tuple(n + 1 for n in donate))

    def run(*arguments: Any) -> Any:
        slots = jax.tree.leaves(arguments[0])[0].shape[0]
        return compiled(replicated(np.array([slots // over.size // block], np.int32), over), *arguments)

    return run


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
