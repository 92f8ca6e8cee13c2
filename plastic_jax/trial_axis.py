"""The trial axis: how the trials of a batch are computed on a device, chosen in this one place.

`map` trains a device's trials one after another inside the compiled program: no trial waits for a longer one, and the
working set of one trial fits a CPU's cache. `vmap` batches them, in blocks of a fixed width, so that a trial's numbers
do not depend on how many others there are (wider batches give other rounding, measured). The rest of the code does
not know which was taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plastic_jax.config import Config, Sweep

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

    def devices(self, available: int) -> int:
        """The most of the available devices that the slots can be shared out to in whole blocks."""
        block = BLOCK if self.trial_axis == "vmap" else 1
        return max(n for n in range(1, available + 1) if self.slots % (n * block) == 0)


def choose(
    sweep: Sweep, point: Config, *, leaves: int, trial_bytes: int, memory: int, devices: int, backend: str
) -> Formulation:
    """The formulation for a program of `leaves` parallel trials on `devices` with `memory` bytes each.

    On a CPU one trial after another with the mended convolution; elsewhere MLPs are batched and convolutional nets
    run one after another with the backend's own convolution (not yet measured there).
    """
    cpu = backend == "cpu"
    axis = sweep.trial_axis
    if axis == "auto":
        axis = "vmap" if point.model == "mlp" and not cpu else "map"
    convolution = sweep.convolution
    if convolution == "auto":
        convolution = "mended" if cpu else "plain"
    block = BLOCK if axis == "vmap" else 1
    wanted = sweep.trials_per_device or (16 if axis == "map" and point.model == "mlp" else 4 if axis == "map" else 64)
    # Half of the memory: copies at stage starts and the compiler's own buffers want room beside the estimate.
    room = max(1, int(memory / 2 // max(trial_bytes, 1)))
    needed = -(-leaves // devices)
    per_device = max(1, min(wanted, room, needed))
    per_device = -(-per_device // block) * block
    return Formulation(axis, convolution, per_device * min(devices, leaves))


def over_trials(function: Callable[..., Any], axis: str, mesh: Mesh, donate: tuple[int, ...] = ()) -> Callable:
    """`function(trial, shared)` for one trial, compiled for a batch: every leaf of the arguments but the last is
    stacked on a leading trial axis, which is sharded over the mesh's axis `trials`.

    No collectives: a device never waits for another inside the call.
    """

    def batched(*arguments: Any) -> Any:
        *trials, shared = arguments
        merged = {k: v for tree in trials for k, v in tree.items()}
        block = BLOCK if axis == "vmap" else None
        return jax.lax.map(lambda one: function(one, shared), merged, batch_size=block)

    def call(*arguments: Any) -> Any:
        specs = (PartitionSpec("trials"),) * (len(arguments) - 1) + (PartitionSpec(),)
        sharded = jax.shard_map(
            batched, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("trials"), check_vma=False
        )
        return sharded(*arguments)

    return jax.jit(call, donate_argnums=donate)


def mesh(devices: list[jax.Device]) -> Mesh:
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
