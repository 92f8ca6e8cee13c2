"""Kernels: how a block of trials is computed. This file is the only one that knows which ways there are.

A *form* changes rounding, never the random draws (contract 1). T is the number of trials that are computed together, K
G of them: K groups one after another in memory, in each the channels of G trials side by side.

| kernels | T | how |
|---|---|---|
| `packed` | K G | K dense convolutions, each of G trials, block-diagonal; all else is one operation for all trials |
| `mapped` | 1 | JAX's own operations |
| `products` | 1 | a CPU's: convolutions whose gradients are fast inside XLA's loops (`loops.py`) |
| `native` | 1 | a CPU's: compiled by this machine's C++ compiler (`units.py`, `dense.py`, `cc/`) |
"""

from dataclasses import dataclass
from typing import Any

from plastic_jax.errors import InputError
from plastic_jax.kernels import library
from plastic_jax.kernels.mapped import Activations, Mapped
from plastic_jax.kernels.native import Native
from plastic_jax.kernels.packed import Packed
from plastic_jax.kernels.products import Products

__all__ = ["KERNELS", "Activations", "Form", "available", "of", "require"]

KERNELS: dict[str, type[Mapped]] = {"packed": Packed, "mapped": Mapped, "products": Products, "native": Native}


@dataclass(frozen=True)
class Form:
    """How trials are computed: `block` (T) at a time, `group` (G) of these side by side in the channels.

    Raises:
      InputError: for kernels that are none, for a block that does not divide, or one where trials come one by one.
    """

    kernels: str
    block: int = 1
    group: int = 1

    def __post_init__(self):
        if self.kernels not in KERNELS:
            raise InputError(f"kernels is {self.kernels!r}; it must be one of {', '.join(KERNELS)}.")
        if self.kernels != "packed" and max(self.block, self.group) > 1:
            field = "block" if self.block > 1 else "group"
            raise InputError(
                f"--config.{field}={max(self.block, self.group)} is not allowed with kernels={self.kernels}: these "
                "compute one trial at a time; packed ones compute blocks."
            )
        if min(self.block, self.group) < 1 or self.block % self.group:
            raise InputError(
                f"--config.group={self.group} is not allowed with block={self.block}: a block holds whole groups of "
                "trials, so that the group must divide it."
            )

    def __str__(self) -> str:
        return f"packed({self.block // self.group}x{self.group})" if self.kernels == "packed" else self.kernels


def of(form: Form, trials: int, compute_dtype: str) -> Mapped:
    """The operations of that form for `trials` trials at a time; 1 is always possible."""
    return KERNELS[form.kernels](trials, min(form.group, trials), compute_dtype)


def available(kernels: str, backend: str) -> bool:
    """Whether that backend has them; for `native`, the first call may compile for some seconds."""
    if kernels in ("products", "native") and backend != "cpu":
        return False
    return kernels != "native" or library.available()


def require(kernels: str, backend: str) -> None:
    """Raises an InputError that says why that backend has no such kernels, if so."""
    if kernels == "native":
        library.require(backend)
    if not available(kernels, backend):
        raise InputError(
            f"--config.kernels={kernels} is not allowed on {backend}: these kernels are for a CPU; take packed or "
            "mapped ones."
        )


def batched(form: Form) -> bool:
    """Whether such kernels compute several trials at a time."""
    return KERNELS[form.kernels].batched


def adam(form: Form) -> Any:
    """Adam's update in one pass over memory, where these kernels have it, else None."""
    return KERNELS[form.kernels].adam
