"""What all figures share: colours, axes with places for values, saving."""

import contextlib
import io
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plastic_jax import files
from plastic_jax.results import settings
from plastic_jax.results.settings import Setting

if TYPE_CHECKING:  # matplotlib and jinja2 are imported where they are used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MARKERS = "osD^vPX"


WARM_START = "warm_start_epochs"


GREY = "#666666"


_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.dpi": 160,
}


@dataclass(frozen=True)
class Figure:
    """A figure drawn into WORKDIR/figures/NAME.png."""

    name: str
    caption: str
    path: Path


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's are."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def save_figure(canvas: "Canvas", workdir: str | os.PathLike[str], name: str, caption: str) -> Figure:
    """Draw a matplotlib figure into WORKDIR/figures/NAME.png; equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with plain_style():
        FigureCanvasAgg(canvas).print_png(buffer, metadata={"Software": None})
    path = Path(workdir) / "figures" / f"{name}.png"
    files.replace_file(path, buffer.getvalue())
    return Figure(name, caption, path)


def value_text(value: Any) -> str:
    """A swept value as text; '-' where the field has no effect."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def combination(arm: Mapping[str, Any], fields: Sequence[str]) -> str:
    """An arm's values of some swept fields, in words; fields without effect on it are left out."""
    return ", ".join(f"{field}={value_text(arm[field])}" for field in fields if arm[field] is not None)


def longest(setting: Setting) -> list[dict[str, Any]]:
    """The compared arms with the longest warm start, one per combination of the other fields.

    All compared arms where the warm-start length is not swept.
    """
    compared = [arm for arm in setting.arms if not setting.is_fresh(arm["arm"])]
    if WARM_START not in setting.swept:
        return compared
    most = max((arm[WARM_START] or 0 for arm in compared), default=0)
    return [arm for arm in compared if (arm[WARM_START] or 0) == most]


def title_of(title: str, numbers: Sequence[int], what: str, columns: int, shown: str = "") -> str:
    """A title wrapped to `columns` letters, then how many seeds there are and what of them (`shown`)."""
    few, many = min(numbers, default=0), max(numbers, default=0)
    shown = shown or ("mean and 95 % interval" if many >= settings.LEAST_PAIRS_T else "mean")
    seeds = f"{few}" if few == many else f"{few}-{many}"
    what += "s" * (many != 1)
    wrapped = [part for line in title.splitlines() for part in textwrap.wrap(line, columns)]
    return "\n".join([*wrapped, f"{seeds} {what}; {shown}"])


def nothing(axes: "Axes", why: str) -> None:
    """Write into an empty panel why it is empty."""
    axes.text(0.5, 0.93, why, transform=axes.transAxes, ha="center", color=GREY)


def on_axis(setting: Setting, *fields: str) -> str:
    """The first of `fields` that is swept, else the number of pretraining epochs."""
    return next((name for name in fields if name in setting.swept), WARM_START)


def is_number(value: Any) -> bool:
    """Whether it is a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def places(values: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Where each value stands on the axis, and whether that is a log scale."""
    if not all(map(is_number, values)):
        return {value: float(at) for at, value in enumerate(dict.fromkeys(values))}, False
    positive = [value for value in values if value > 0]
    if min(values, default=0) < 0 or not positive or max(positive) <= 20 * min(positive):
        return {value: float(value) for value in sorted(values)}, False
    first = math.log10(min(positive))
    return {v: math.log10(v) if v > 0 else first - 0.5 for v in sorted(values)}, True


def slot_width(place: dict[Any, float], lines: int) -> float:
    """Room for one of `lines` at a value, in axis units: a share of the room between values."""
    at = sorted(place.values())
    width = at[-1] - at[0] if len(at) > 1 else 1.0
    return min(0.03 * width, 0.65 * min(np.diff(at), default=width) / max(lines, 1))


def value_ticks(axes: "Axes", place: dict[Any, float], beside: float = 0.0) -> None:
    """A tick at each value, and a label where the one before it leaves room; lines reach `beside` either side of it."""
    low, high = min(place.values(), default=0.0), max(place.values(), default=0.0)
    width = (high - low) or 1.0
    labels: list[str] = []
    last = -math.inf
    for value, at in place.items():
        room = at - last >= 0.055 * width
        labels.append(value_text(value) if room else "")
        last = at if room else last
    axes.set_xticks(list(place.values()), labels)
    axes.set_xlim(low - 0.06 * width - beside, high + 0.06 * width + beside)
    if max(map(len, labels), default=0) > 8:
        axes.tick_params(axis="x", labelrotation=30)
