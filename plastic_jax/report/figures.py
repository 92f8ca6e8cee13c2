"""The paper's figures, drawn from the results table.

They go through matplotlib's object interface (no pyplot, no user style) into PNGs whose bytes
depend on the data alone. Colours are those of Okabe & Ito, told apart by colour-blind readers.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from plastic_jax.results import estimates, pairing, settings
from plastic_jax.results.settings import CONTINUED, TUNING, Setting

if TYPE_CHECKING:  # matplotlib and jinja2 are imported where they are used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
from plastic_jax.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    WARM_START,
    combination,
    is_number,
    longest,
    nothing,
    places,
    plain_style,
    slot_width,
    title_of,
    value_text,
    value_ticks,
)


def _arm_label(arm: dict[str, Any], setting: Setting) -> str:
    """An arm in a legend: its warm-start length where that is swept, else its name."""
    if WARM_START not in setting.swept:
        return arm["arm"]
    if setting.is_fresh(arm["arm"]):
        return "fresh"
    return f"pretrained for {value_text(arm[WARM_START])} epochs"


def accuracy_curves(table: pd.DataFrame, setting: Setting, title: str, arm: str | None = None) -> "Canvas":
    """The paper's figure 1: accuracy over both stages, and the metric of each seed.

    Left: mean over seeds of test accuracy (solid, with a 95 % t interval) and train accuracy
    (dashed) against passes over the tuning data, counted from where the tuning stage begins, so
    that the tuning stages of both arms lie above one another and pretraining lies to the left.
    Right: the metric, a line per seed. `arm`: the arm to show beside its fresh arm; by default the
    first with the longest warm start. Only trials that finished and did not diverge are shown, and
    means only where all of them have been evaluated.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    by_name = {one["arm"]: one for one in setting.arms}
    shown = by_name[arm] if arm is not None else (longest(setting) or setting.arms)[0]
    fresh = by_name[setting.fresh[shown["arm"]]]
    metrics = pairing.trial_metrics(table, setting)
    sound = metrics[metrics["finished"] & ~metrics["diverged"]]
    heading = title
    if WARM_START in setting.swept:
        others = combination(shown, [field for field in setting.swept if field != WARM_START])
        heading += f", {others}" * bool(others)
    with plain_style():
        canvas = Canvas(figsize=(9.5, 4.8), layout=ConstrainedLayoutEngine(wspace=0.06))
        curves, dots = canvas.subplots(1, 2, width_ratios=(2.5, 1))
        handles: list[Line2D] = []
        seeds: list[int] = []
        continued = False
        both = [fresh] if fresh is shown else [fresh, shown]
        for colour, one in zip(COLOURS, both, strict=False):
            rows = _aligned(table, sound.loc[sound["arm"] == one["arm"], "trial"])
            _draw_arm(curves, rows, colour)
            continued |= one is fresh and bool((rows["stage"] == CONTINUED).any())
            seeds.append(rows["trial"].nunique())
            handles.append(Line2D([], [], color=colour, lw=3, label=_arm_label(one, setting)))
        if continued:
            label = f"{_arm_label(fresh, setting)}, trained on (control)"
            handles.insert(1, Line2D([], [], color=COLOURS[0], lw=3, alpha=0.45, label=label))
        handles += [
            Line2D([], [], color=GREY, label="test"),
            Line2D([], [], color=GREY, lw=1, ls="--", label="train"),
        ]
        curves.set_title(title_of(heading, seeds, "seed", 62), pad=18)
        curves.axvline(0, color=GREY, lw=1)
        note: dict[str, Any] = {
            "xycoords": curves.get_xaxis_transform(),
            "textcoords": "offset points",
        }
        curves.annotate("tuning begins", (0, 1), (-2, 4), color=GREY, fontsize=9, **note)
        curves.set_xlabel("passes over the training data since tuning began")
        curves.set_ylabel("accuracy, %")
        curves.margins(x=0.01)
        _draw_pairs(dots, pairing.pairs(table, setting, metrics, shown["arm"]), setting)
        canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return canvas


def _aligned(table: pd.DataFrame, trials: pd.Series) -> pd.DataFrame:
    """The rows of some trials with `x`: passes over the tuning data since tuning began."""
    rows = table[table["trial"].isin(trials)]
    tuning = rows[rows["stage"] == TUNING].sort_values("step")
    ends = tuning.groupby("trial").tail(1).set_index("trial")
    before = rows[~rows["stage"].isin([TUNING, CONTINUED])]
    start = before.groupby("trial")["examples_seen"].max().reindex(ends.index, fill_value=0)
    size = (ends["examples_seen"] - start) / ends["epoch"]
    x = (rows["examples_seen"] - rows["trial"].map(start)) / rows["trial"].map(size)
    return rows.assign(x=x)


def _draw_arm(axes: "Axes", rows: pd.DataFrame, colour: str) -> None:
    trials = rows["trial"].nunique()
    # an evaluation of all trials: the same stage and, to 1e-6, the same epoch
    rows = rows.assign(epoch=rows["epoch"].round(6))
    present = rows.groupby(["stage", "epoch"])["trial"].transform("nunique")
    for stage, of_stage in rows[(present == trials) & ~rows["diverged"]].groupby("stage"):
        points = of_stage.groupby("epoch")
        x = points["x"].mean()
        look: dict[str, Any] = {"color": colour, "alpha": 0.45 if stage == CONTINUED else 1.0}
        look |= {"marker": "o", "ms": 3} if len(x) < 4 else {}
        axes.plot(x, 100 * points["train_accuracy"].mean(), lw=1, ls="--", zorder=2, **look)
        axes.plot(x, 100 * points["test_accuracy"].mean(), zorder=3, **look)
        bands = [estimates.t_interval(values.to_numpy()) for _, values in points["test_accuracy"]]
        if trials >= settings.LEAST_PAIRS_T:
            low, high = 100 * np.array(bands, dtype=float).T
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _draw_pairs(axes: "Axes", paired: pd.DataFrame, setting: Setting) -> None:
    """The metric of each seed: fresh, the arm and, where it ran, the equal-updates control."""
    names = {"fresh": "fresh", "arm": "pre-\ntrained" if WARM_START in setting.swept else "arm"}
    if paired["control"].notna().any():
        names["control"] = "fresh,\ntrained\non"
    values = 100 * paired[list(names)]
    for _, seed in values.iterrows():
        axes.plot(range(len(names)), seed, color="#c4c4c4", lw=1, marker="o", ms=3, zorder=2)
    for place, column in enumerate(names):
        sample = values[column].dropna().to_numpy()
        if not len(sample):
            continue
        mean = sample.mean()
        low, high = estimates.t_interval(sample) or (mean, mean)
        colour = COLOURS[column == "arm"]
        look: dict[str, Any] = {"color": colour, "mfc": "white" if column == "control" else colour}
        bars = [[mean - low], [high - mean]]
        axes.errorbar(place, mean, bars, fmt="o", ms=7, capsize=4, zorder=4, **look)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("test accuracy, %")
    many = setting.metric_epochs > 1
    epochs = f"mean of last {setting.metric_epochs} epochs" if many else "last epoch"
    axes.set_title(f"{epochs},\na line per seed", pad=18)


def gap_curve(
    table: pd.DataFrame,
    summary: Sequence[dict[str, Any]],
    setting: Setting,
    x: str = WARM_START,
    line: str | None = "optimizer",
    title: str = "Generalisation gap",
    xlabel: str | None = None,
) -> "Canvas":
    """The paper's figures 2 and 8-10: the gap against a swept field, in percentage points.

    Filled markers with bars: mean and paired 95 % t interval; dots: the seeds; hollow markers,
    dashed: the gap at equal updates. A cross instead of a marker: no verdict (networks that do not
    fit their data, more than a tenth diverged, fewer than 3 pairs). One line per combination of the
    swept fields other than `x`; `line` names the field that sets the colour. From three lines on,
    the gap at equal updates has a panel of its own and the seeds are left out. A numeric `x` that
    spans more than a factor of 20 is drawn on a log axis, with a place for 0. Raises ValueError
    where `x` is not swept.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    if x not in setting.swept:
        raise ValueError(f"{x!r} is not a swept field; swept are {', '.join(setting.swept)}")
    compared = [r for r in summary if not setting.is_fresh(r["arm"]) and r[x] is not None]
    told = [f for f in setting.swept if f != x and len({row[f] for row in compared}) > 1]  # lines apart
    others = sorted(told, key=lambda f: f != line)
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in compared:
        lines.setdefault(tuple(row[field] for field in others), []).append(row)
    depth = 1 if line in others else len(others)  # of the key that sets the colour
    colours = dict(zip(dict.fromkeys(key[:depth] for key in lines), itertools.cycle(COLOURS), strict=False))
    values = [row[x] for row in compared]
    place, logarithmic = places(values)
    joined = "-" if all(map(is_number, values)) else ""  # nothing to join between names
    slot = slot_width(place, len(lines))
    controlled = any(row["gap_equal_updates"] is not None for row in compared)
    crowded = len(lines) > 2
    metrics = pairing.trial_metrics(table, setting)
    with plain_style():
        panels = 2 if crowded and controlled else 1
        canvas = Canvas(figsize=(7.5 if panels == 1 else 11, 4.8), layout="constrained")
        axes = canvas.subplots(1, panels, sharey=True, squeeze=False)[0]
        handles: list[Line2D] = []
        for index, (key, rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda row: place[row[x]])
            marker = MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]
            look: dict[str, Any] = {"color": colours[key[:depth]], "marker": marker}
            # lines stand beside one another, so that their bars do not hide one another
            at = np.array([place[row[x]] for row in rows]) + (index - (len(lines) - 1) / 2) * slot
            _draw_gaps(axes[0], at, rows, "gap", 1.0, joined, **look)
            if controlled:
                beside, alpha = (0.0, 0.8) if crowded else (0.35 * slot, 0.5)
                column = "gap_equal_updates"
                _draw_gaps(axes[-1], at + beside, rows, column, alpha, 2 * joined, **look)
            for center, row in zip(at, rows, strict=True):
                if not crowded:
                    paired = pairing.pairs(table, setting, metrics, row["arm"])
                    gaps = 100 * (paired["arm"] - paired["fresh"])
                    dots = [center - 0.25 * slot] * len(gaps)
                    axes[0].scatter(dots, gaps, s=8, lw=0, color=look["color"], alpha=0.35)
            label = combination(dict(zip(others, key, strict=True)), others)
            named = others == [line] and isinstance(key[0], str)
            label = value_text(key[0]) if named else label or "gap"
            handles.append(Line2D([], [], label=label, ls=joined, **look))
        if controlled and panels == 1:
            look: dict[str, Any] = {
                "color": GREY,
                "alpha": 0.6,
                "marker": "o",
                "mfc": "white",
                "ls": 2 * joined,
            }
            handles.append(Line2D([], [], label="at equal updates", **look))
        if any(row["verdict"] in (None, "not fitted") for row in compared):
            look: dict[str, Any] = {"color": GREY, "ls": "", "marker": "x", "mew": 2}
            handles.append(Line2D([], [], label="no verdict", **look))
        label = xlabel or ("pretraining epochs" if x == WARM_START else x.replace("_", " "))
        for one in axes:
            one.axhline(0, color="black", lw=1, zorder=1)
            value_ticks(one, place, slot * (len(lines) - 1) / 2)
            one.set_xlabel(label + " (log scale)" * logarithmic)
        if not compared:
            nothing(axes[0], "no arm beside the fresh one")
        axes[0].set_ylabel("generalisation gap, percentage points")
        pairs = [row["pairs"] for row in compared]
        axes[0].set_title(title_of(title, pairs, "paired seed", 62 if panels == 1 else 52))
        if panels == 2:
            axes[1].set_title("against a fresh network\nafter as many updates")
        longest_label = max((len(str(handle.get_label())) for handle in handles), default=0)
        columns = max(1, min(len(handles), 4 * panels, 110 * panels // (longest_label + 8)))
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns)
    return canvas


def _draw_gaps(
    axes: "Axes",
    at: np.ndarray,
    rows: Sequence[dict[str, Any]],
    column: str,
    alpha: float,
    style: str,
    color: str,
    marker: str,
) -> None:
    """A line of gaps in points with their intervals; `column`: of `summary`."""
    shown = [row[column] is not None for row in rows]
    at, rows = at[shown], list(itertools.compress(rows, shown))
    means = np.array([100 * row[column] for row in rows])
    ends = np.array([row[f"{column}_ci95"] or (row[column],) * 2 for row in rows]).reshape(-1, 2)
    bars = np.abs(100 * ends.T - means)
    counts = np.array([row["verdict"] not in (None, "not fitted") for row in rows], dtype=bool)
    equal = column == "gap_equal_updates"
    look: dict[str, Any] = {"color": color, "alpha": alpha, "zorder": 3 if equal else 4}
    axes.errorbar(at, means, bars, ls=style, capsize=3, elinewidth=1.2, **look)
    face = "white" if equal else color
    axes.plot(at[counts], means[counts], ls="", marker=marker, ms=6, mfc=face, **look)
    axes.plot(at[~counts], means[~counts], ls="", marker="x", ms=8, mew=2, **look)
