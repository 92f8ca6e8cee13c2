"""What a network keeps in memory: walks over the jaxprs of its forward pass; nothing is compiled or computed."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from plastic_jax.train.count import inner

_VIEWS = ("reshape", "squeeze", "expand_dims")


def kept(jaxpr: Any, given: Sequence[bool]) -> int:
    """Values that the backward pass needs from the forward pass, where `jaxpr` gives what JAX keeps for it.

    Only what depends on the arguments marked in `given` counts; these themselves do not. The same value under another
    shape, times a number, or computed twice counts once. What is true or false counts nothing: XLA computes it anew.
    """
    depends = {n for n, own in enumerate(given) if own}
    numbers: dict[Any, int] = {}

    def number(key: Any) -> int:
        return numbers.setdefault(key, len(given) + len(numbers))

    def walk(program: Any, arguments: Sequence[int]) -> list[int]:
        values = dict(zip(program.invars, arguments, strict=True))

        def of(value: Any) -> int:
            if hasattr(value, "val"):
                return number(("constant", str(value.val), value.aval.shape))
            return values[value] if value in values else values.setdefault(value, number(("constant", id(value))))

        for equation in program.eqns:
            name, programs = equation.primitive.name, inner(equation)
            own = [of(value) for value in equation.invars]
            scaled = name in ("mul", "div", "neg") and [v for v in equation.invars if not hasattr(v, "val")]
            if name in _VIEWS or (scaled and len(scaled) == 1):
                made = [of(scaled[0]) if scaled else own[0]]
            elif name in ("jit", "pjit", "closed_call") and len(programs) == 1:
                made = walk(programs[0], own)
            else:
                same = (name, *own, "" if programs else str(equation.params))
                key = (*same, id(equation)) if programs else same
                made = [number((key, n)) for n, _ in enumerate(equation.outvars)]
                if depends.intersection(own):
                    depends.update(made)
            values.update(zip(equation.outvars, made, strict=True))
        return [of(value) for value in program.outvars]

    found = walk(jaxpr, range(len(given)))
    sizes = {
        n: value.aval.size
        for n, value in zip(found, jaxpr.outvars, strict=True)
        if n in depends and n >= len(given) and jnp.issubdtype(value.aval.dtype, jnp.floating)
    }
    return sum(sizes.values())


def most_alive(jaxpr: Any, given: Sequence[bool]) -> int:
    """The most values that are needed at a time while a program runs one equation after another.

    Only what depends on the arguments marked in `given` counts; these themselves do not. A reshaped array is the same.
    """
    source: dict[Any, Any] = {}  # of what is reshaped
    last: dict[Any, int] = {}
    for position, equation in enumerate([*jaxpr.eqns, None]):
        for value in equation.invars if equation else jaxpr.outvars:
            if hasattr(value, "val"):  # a constant
                continue
            last[source.get(value, value)] = position
        if equation and equation.primitive.name in _VIEWS:
            source[equation.outvars[0]] = source.get(equation.invars[0], equation.invars[0])
    depends = {value for value, own in zip(jaxpr.invars, given, strict=True) if own}
    alive: dict[Any, int] = {}
    most = 0
    for position, equation in enumerate(jaxpr.eqns):
        own = [not hasattr(value, "val") and value in depends for value in equation.invars]
        if not any(own):
            continue
        depends |= {*equation.outvars}
        made = {value: value.aval.size for value in equation.outvars if value not in source}
        programs = [program for program in inner(equation) if len(program.invars) == len(own)]
        within = max([sum(made.values()), *(most_alive(program, own) for program in programs)])
        most = max(most, sum(alive.values()) + within)
        alive = {value: size for value, size in (alive | made).items() if last.get(value, -1) > position}
    return most
