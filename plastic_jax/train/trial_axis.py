"""The trial axis: how the trials of a batch share the devices.

A device's trials are cut into blocks of a fixed width, computed one after another inside the compiled program: so no
block waits for a longer one, and a trial's numbers do not depend on how many others there are. A block is vmapped; what
that means for the network is `kernels`' affair. A block of one trial is not vmapped at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plastic_jax.kernels import Form

Tree = Any


@dataclass(frozen=True)
class Formulation(Form):
    """A form, and how many trials are side by side over all devices: changes rounding, never the random draws."""

    slots: int = 1

    def devices(self, available: int) -> int:
        """The most of the available devices that the slots can be shared out to in whole blocks."""
        return max(n for n in range(1, available + 1) if self.slots % (n * self.block) == 0)

    @property
    def form(self) -> Form:
        """Without the slots."""
        return Form(self.kernels, self.block, self.group)


class Batched:
    """A function over a batch of trials: call it, or `lower` it, to be analysed or compiled ahead of its first call."""

    def __init__(self, compiled: Any, over: Mesh, block: int):
        self._compiled, self._over, self._block = compiled, over, block
        self._executables: dict[Any, Any] = {}

    def knows(self, *arguments: Any) -> bool:
        """Whether it has been compiled for such arguments."""
        return _shapes(arguments) in self._executables

    def keep(self, arguments: Any, executable: Any) -> None:
        """Take what `lower(*arguments)` was compiled to for later calls."""
        self._executables[_shapes(arguments)] = executable

    def _with_blocks(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        slots = jax.tree.leaves(arguments[0])[0].shape[0]
        return replicated(np.array([slots // self._over.size // self._block], np.int32), self._over), *arguments

    def __call__(self, *arguments: Any) -> Any:
        """The function's results, stacked."""
        function = self._executables.get(_shapes(arguments), self._compiled)
        return function(*self._with_blocks(arguments))

    def lower(self, *arguments: Any) -> Any:
        """JAX's lowered program for such arguments."""
        return self._compiled.lower(*self._with_blocks(arguments))


def _shapes(arguments: Any) -> Any:
    """What a program depends on, beside the function: the arguments' shapes and types, and JAX's precision."""
    precise = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision  # pyright: ignore
    return precise, tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))


def over_trials(function: Callable[..., Any], block: int, over: Mesh, donate: tuple[int, ...] = ()) -> Batched:
    """`function(*trees, shared)` for one trial, compiled for a batch.

    The returned function takes trees whose leaves are stacked on a leading trial axis, and last the tree `shared`. The
    trial axis is sharded over the mesh; a device never waits for another inside.
    """
    single = block == 1

    def batched(blocks: jax.Array, *arguments: Any) -> Any:
        *trials, shared = arguments

        def one(mine: Any) -> Any:
            if single:
                return function(*mine, shared)
            return jax.vmap(lambda *trees: function(*trees, shared))(*mine)

        def take(i: jax.Array) -> Tree:
            part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * block, block)  # noqa: E731
            return jax.tree.map((lambda leaf: part(leaf)[0]) if single else part, trials)

        def body(i: jax.Array, out: Tree) -> Tree:
            def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(whole, new[None] if single else new, i * block, 0)

            # Barriers keep the slicing, whose form depends on the number of trials, out of a trial's own arithmetic.
            mine = jax.lax.optimization_barrier(take(i))
            return jax.tree.map(put, out, jax.lax.optimization_barrier(one(mine)))

        count = jax.tree.leaves(trials)[0].shape[0]
        shapes = jax.eval_shape(lambda: one(take(jnp.int32(0))))
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


def abstract(tree: Tree, over: Mesh, whole: bool = False) -> Tree:
    """Shapes of such arrays, to compile for: with a leading trial axis, or, as a `whole`, on each device."""
    sharding = NamedSharding(over, PartitionSpec() if whole else PartitionSpec("trials"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def sharded(tree: Tree, over: Mesh) -> Tree:
    """Host arrays with a leading trial axis, put on the mesh's devices.

    Copied first: a CPU device may otherwise share the host's memory, and the caller goes on writing into it.
    """
    own = jax.tree.map(np.array, tree)
    return jax.device_put(own, NamedSharding(over, PartitionSpec("trials")))


def replicated(tree: Tree, over: Mesh) -> Tree:
    """Host arrays, put whole on each of the mesh's devices."""
    return jax.device_put(tree, NamedSharding(over, PartitionSpec()))
