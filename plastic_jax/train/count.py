"""FLOPs of a program: a walk over its jaxpr, for any network; nothing is compiled or computed.

They are counted as XLA's own analysis counts them: two for a multiply-add, only for the taps that fall inside the
image, one for any other operation on one value; none for exponentials, roots and other transcendental functions, for
moving values or for drawing them. Unlike that analysis, the walk counts a scan's body as often as it runs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    "bitcast_convert_type broadcast broadcast_in_dim concatenate copy copy_p device_put dynamic_slice "
    "dynamic_update_slice expand_dims gather iota layout_constraint optimization_barrier pad pcast pvary reshape rev "
    "scatter sharding_constraint slice split squeeze stop_gradient transpose"
)
_TRANSCENDENTAL = _names(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p "
    "logistic pow rsqrt sin sinh sqrt tan tanh"
)
_DRAWS = _names("random_bits random_fold_in random_seed random_split random_unwrap random_wrap threefry2x32")
_PASSES = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
_OPAQUE = _names("ffi_call io_callback pallas_call pure_callback tpu_custom_call triton_kernel_call")


@dataclass(frozen=True)
class Product:
    """A matrix product or a convolution: its FLOPs, two for a multiply-add, and the values that come out.

    `inside` counts the taps that fall inside the image, as XLA does; `padded` all of them, in a forward pass. `joins`
    are the sizes of its three arrays, which its gradients join as well. It runs `times` times.
    """

    inside: int
    padded: int
    outputs: int
    joins: tuple[int, ...]
    times: int = 1


def inner(equation: Any) -> list[Any]:
    """The programs that an equation calls."""
    known = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=known)
    return [getattr(value, "jaxpr", value) for value in found if known(value)]


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The equations of a program that compute, in order, and how many times each runs.

    A scan's body runs once a turn; that of a loop whose turns are not known counts once; of branches only the one with
    the most FLOPs counts.
    """
    for equation in jaxpr.eqns:
        name, programs = equation.primitive.name, inner(equation)
        if name == "cond":
            programs = [max(programs, key=flops)]
        if name in _OPAQUE or name in _PASSES or name.startswith("scatter") or not programs:
            yield equation, times
            continue
        if name == "while":
            yield equation, times  # the loop itself, so that it can be named
        for program in programs:
            yield from equations(program, times * _turns(equation))


def _turns(equation: Any) -> int:
    """How often the program of an equation runs."""
    if equation.primitive.name == "shard_map":
        return equation.params["mesh"].size  # the program is that of one device
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def flops(jaxpr: Any) -> float:
    """FLOPs of a program, without what `unread` names."""
    return float(sum(times * _flops(equation) for equation, times in equations(jaxpr)))


def _flops(equation: Any) -> int:
    name = equation.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
        return _product(equation, 1).inside
    if name in _MOVES or name in _TRANSCENDENTAL or name in _DRAWS or name in _OPAQUE or name == "while":
        return 0
    given, made = (max((v.aval.size for v in side), default=0) for side in (equation.invars, equation.outvars))
    if name in _PASSES:
        return max(given - made, 0)
    if name.startswith("scatter"):
        return equation.invars[2].aval.size
    if name == "integer_pow":
        return made * max(abs(equation.params["y"]).bit_length() - 1, 1)
    return made


def products(jaxpr: Any) -> list[Product]:
    """All of a program's products, in order.

    A product and its gradients take the same taps; the first with the same arrays, which is the forward pass's, says
    how many there are with those that fall outside the image.
    """
    first: dict[Any, int] = {}
    found = []
    for equation, times in equations(jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            one = _product(equation, times)
            padded = first.setdefault((one.inside, one.joins), one.padded)
            found.append(Product(one.inside, padded, one.outputs, one.joins, times))
    return found


def unread(jaxpr: Any) -> tuple[str, ...]:
    """What the walk cannot count, in words: operations that are no JAX program, and loops of unknown length."""
    found: dict[str, None] = {}
    for equation, _ in equations(jaxpr):
        name = equation.primitive.name
        if name in _OPAQUE:
            found[f"{name} is not counted"] = None
        elif name == "while":
            found["a while loop's body is counted once"] = None
    return tuple(found)


def _product(equation: Any, times: int) -> Product:
    arrays = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
    joins = tuple(sorted(math.prod(shape) for shape in arrays))
    outputs = equation.outvars[0].aval.size
    if equation.primitive.name == "dot_general":
        (over, _), _ = equation.params["dimension_numbers"]
        total = 2 * outputs * math.prod(arrays[0][axis] for axis in over)
        return Product(total, total, outputs, joins, times)
    inside, padded = _taps(equation, *arrays)
    numbers = equation.params["dimension_numbers"]
    channels = 2 * math.prod(arrays[2][axis] for axis in numbers.out_spec[:2]) * arrays[1][numbers.rhs_spec[1]]
    return Product(channels * inside, channels * padded, outputs, joins, times)


def _taps(equation: Any, given: tuple, kernel: tuple, out: tuple) -> tuple[int, int]:
    """Pairs of an output's pixel and a tap: those inside the image, and all."""
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
        padded *= taps * (size if holes > 1 else outputs)
    return inside, padded
