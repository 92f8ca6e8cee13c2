"""Counting in a program: a walk over its jaxpr, for any network; nothing is compiled or computed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Product:
    """A matrix product or a convolution: its FLOPs, two for a multiply-add, and the values that come out.

    `inside` counts the taps that fall inside the image, as XLA does; `padded` all of them, in a forward pass.
    """

    inside: int
    padded: int
    outputs: int


def inner(equation: Any) -> list[Any]:
    """The programs that an equation calls."""
    known = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=known)
    return [getattr(value, "jaxpr", value) for value in found if known(value)]


def products(jaxpr: Any) -> Iterator[Product]:
    """All of a program's products, in order; a loop's body counts once, of branches each."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (over, _), _ = equation.params["dimension_numbers"]
            outputs = equation.outvars[0].aval.size
            flops = 2 * outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in over)
            yield Product(flops, flops, outputs)
        elif name == "conv_general_dilated":
            yield _convolution(equation)
        else:
            for program in inner(equation):
                yield from products(program)


def _convolution(equation: Any) -> Product:
    given, kernel, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    numbers = equation.params["dimension_numbers"]
    inside = padded = 1
    for axis, spatial in enumerate(numbers.lhs_spec[2:]):
        size, taps = given[spatial], kernel[numbers.rhs_spec[2 + axis]]
        outputs = out[numbers.out_spec[2 + axis]]
        low = equation.params["padding"][axis][0]
        stride, holes, apart = (
            equation.params[name][axis] for name in ("window_strides", "lhs_dilation", "rhs_dilation")
        )
        places = (o * stride + tap * apart - low for o in range(outputs) for tap in range(taps))
        inside *= sum(place % holes == 0 and 0 <= place <= (size - 1) * holes for place in places)
        padded *= taps * outputs
    channels = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    return Product(channels * inside, channels * padded, equation.outvars[0].aval.size)


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
        if equation and equation.primitive.name in ("reshape", "squeeze", "expand_dims"):
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
