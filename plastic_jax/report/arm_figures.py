"""Figures that set arms side by side: stages, sizes, resets, training speed, chunks (the paper's 4-7 and 11)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from plastic_jax.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    WARM_START,
    combination,
    nothing,
    places,
    plain_style,
    slot_width,
    title_of,
    value_text,
    value_ticks,
)
from plastic_jax.results import estimates, pairing
from plastic_jax.results.settings import CONTINUED, TUNING, Setting

if TYPE_CHECKING:  # matplotlib is imported where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Arm = Mapping[str, Any]
REACHED = 0.99  # train accuracy by which training speed is measured (the paper's figure 11)


@dataclass(frozen=True)
class Panel:
    """A panel of `accuracy_against`: the swept field on its axis, the axis' label, the values that lines must have.

    `line`: name of a line that nothing else tells apart (by default its own values); `beside`: of a fresh arm on which
    `x` has no effect.
    """

    x: str
    xlabel: str
    only: Mapping[str, Any] = field(default_factory=dict)
    line: str = ""
    beside: str = "fresh"


def _estimate(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and how far its 95 % t interval reaches below and above, in percent."""
    mean = 100 * float(values.mean())
    low, high = estimates.t_interval(values) or (values.mean(),) * 2
    return mean, mean - 100 * low, 100 * high - mean


def accuracy_against(table: pd.DataFrame, setting: Setting, panels: Sequence[Panel], title: str) -> "Canvas":
    """Test accuracy against swept fields, a panel for each: mean over seeds with a 95 % t interval.

    A line for each combination of the other swept fields. Fresh arms are drawn open and dashed; where a fresh arm has
    a value of `x` and no other (0 stages), every line begins there. Arms on which `x` has no effect are horizontal.
    """
    from matplotlib.figure import Figure as Canvas

    metrics = pairing.trial_metrics(table, setting)
    sound = metrics[metrics["finished"] & ~metrics["diverged"]]
    samples = {name: rows["test_accuracy"].to_numpy() for name, rows in sound.groupby("arm")}
    with plain_style():
        canvas = Canvas(figsize=(7.5 if len(panels) == 1 else 11, 4.8), layout="constrained")
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for one, panel in zip(axes, panels, strict=True):
            arms = [arm for arm in setting.arms if arm["arm"] in samples]
            logarithmic = _draw_panel(one, arms, samples, setting, panel)
            one.set_xlabel(panel.xlabel + " (log scale)" * logarithmic)
            if len(panels) > 1:
                one.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        axes[0].set_ylabel("test accuracy, %")
        counts = [len(values) for values in samples.values()]
        axes[0].set_title(title_of(title, counts, "seed", 62 if len(panels) == 1 else 100))
        if len(panels) == 1:
            canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return canvas


def _draw_panel(
    axes: "Axes", arms: Sequence[Arm], samples: Mapping[str, np.ndarray], setting: Setting, panel: Panel
) -> bool:
    """Draw the lines; whether the axis is a log one."""
    others = [name for name in setting.swept if name != panel.x]

    def fits(arm: Arm) -> bool:
        return all(arm[name] in (value, None) for name, value in panel.only.items())

    on = [arm for arm in arms if arm[panel.x] is not None and fits(arm)]
    shared = [a for a in on if setting.is_fresh(a["arm"]) and all(a[n] is None for n in others)] if others else []
    lines: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in on:
        if arm not in shared or len(on) == len(shared):
            lines.setdefault(tuple(arm[name] for name in others), []).append(arm)
    place, logarithmic = places([arm[panel.x] for arm in on])
    slot = slot_width(place, len(lines))
    told = [name for k, name in enumerate(others) if len({key[k] for key in lines}) > 1 and name not in panel.only]
    coloured = [name for name in told if name != WARM_START]
    lengths = sorted({dict(zip(others, key, strict=True)).get(WARM_START) or 0 for key in lines} - {0})
    colours: dict[str, str] = {}
    for index, (key, own) in enumerate(lines.items()):
        values = dict(zip(others, key, strict=True))
        fresh = all(setting.is_fresh(arm["arm"]) for arm in own)
        name = combination(values, coloured)
        colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
        length = values.get(WARM_START) or 0
        marker = [*colours].index(name) + (lengths.index(length) if length else 0)
        look: dict[str, Any] = {"marker": MARKERS[marker % len(MARKERS)]}
        look |= {"ls": "--", "mfc": "white"} if fresh else {}
        drawn = sorted([*shared, *own], key=lambda arm: place[arm[panel.x]])
        at = np.array([place[arm[panel.x]] for arm in drawn]) + (index - (len(lines) - 1) / 2) * slot
        means, below, above = np.array([_estimate(samples[arm["arm"]]) for arm in drawn]).T
        label = (
            ", ".join(filter(None, [name, _kind(values, fresh, told)]))
            or combination(panel.only, list(panel.only))
            or panel.line
            or combination(values, others)
            or "mean"
        )
        axes.errorbar(at, means, [below, above], color=colour, capsize=3, elinewidth=1.2, ms=6, label=label, **look)
    beside = [arm for arm in arms if arm[panel.x] is None]
    apart_by = [name for name in others if len({arm[name] for arm in beside}) > 1]
    for arm, style in zip(beside, ("--", ":", "-."), strict=False):
        mean, below, above = _estimate(samples[arm["arm"]])
        axes.axhspan(mean - below, mean + above, color=GREY, alpha=0.13, lw=0)
        words = [panel.beside, combination(arm, apart_by)]
        name = ", ".join(filter(None, words)) if setting.is_fresh(arm["arm"]) else arm["arm"]
        axes.axhline(mean, color=GREY, ls=style, lw=1.4, zorder=1, label=name)
    value_ticks(axes, place, slot * (len(lines) - 1) / 2)
    return logarithmic


def _kind(values: Arm, fresh: bool, told: Sequence[str]) -> str:
    if WARM_START not in told:
        return ""
    return "fresh" if fresh else f"pretrained for {value_text(values[WARM_START])} epochs"


def apart(setting: Setting, field: str) -> list[tuple[str, Setting]]:
    """A setting cut into those of one value each of all swept fields but `field`: their values in words, and the arms.

    Each has its fresh arms; arms on which `field` has no effect are left out. The words are empty where there is one
    such setting.
    """
    others = [name for name in setting.swept if name != field]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for arm in setting.arms:
        if not setting.is_fresh(arm["arm"]) and arm[field] is not None:
            groups.setdefault(tuple(arm[name] for name in others), []).append(arm)
    if len(groups) < 2:
        return [("", setting)]
    told = [name for k, name in enumerate(others) if len({key[k] for key in groups}) > 1]
    found = []
    for arms in groups.values():
        names = {arm["arm"] for arm in arms} | {setting.fresh[arm["arm"]] for arm in arms}
        own = tuple(arm for arm in setting.arms if arm["arm"] in names)
        fresh = {name: setting.fresh[name] for name in names}
        found.append((combination(arms[0], told), dataclasses.replace(setting, arms=own, fresh=fresh)))
    return found


def reset_gaps(
    table: pd.DataFrame,
    summary: Sequence[dict[str, Any]],
    setting: Setting,
    groups: Mapping[str, Sequence[str]],
    title: str,
) -> "Canvas":
    """The paper's figure 6: the gap after a reset, in percentage points; a panel for each group of sets of modules.

    Sets of no group have a panel of their own. The setting holds one arm for each set (`apart`).
    Markers with bars: mean and paired 95 % t interval; dots: the seeds; hollow: at equal updates; a cross: no verdict.
    The grey band is the gap without a reset.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    named = {arm["arm"] for arm in setting.arms}
    own = [row for row in summary if row["arm"] in named and row.get("reset") is not None]
    compared = {row["reset"]: row for row in own if row["gap"] is not None}
    grouped = {"none", *(name for sets in groups.values() for name in sets)}
    groups = {**groups, "other modules reset": [name for name in compared if name not in grouped]}
    metrics = pairing.trial_metrics(table, setting)
    shown = {name: [s for s in sets if s in compared] for name, sets in groups.items()}
    shown = {name: sets for name, sets in shown.items() if sets} or {"": []}
    with plain_style():
        canvas = Canvas(figsize=(11, 4.8), layout="constrained")
        axes = canvas.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        controlled = uncounted = False
        for one, (name, sets) in zip(axes, shown.items(), strict=True):
            if none := compared.get("none"):
                low, high = none["gap_ci95"] or (none["gap"],) * 2
                one.axhspan(100 * low, 100 * high, color=GREY, alpha=0.15, lw=0)
                one.axhline(100 * none["gap"], color=GREY, lw=1.2, ls="--")
            one.axhline(0, color="black", lw=1, zorder=1)
            for at, modules in enumerate(sets):
                row = compared[modules]
                paired = pairing.pairs(table, setting, metrics, row["arm"])
                gaps = 100 * (paired["arm"] - paired["fresh"])
                one.scatter([at - 0.18] * len(gaps), gaps, s=8, lw=0, color=COLOURS[0], alpha=0.35)
                crossed = row["verdict"] in (None, "not fitted")
                uncounted |= crossed
                look: dict[str, Any] = {"color": COLOURS[0], "capsize": 3, "elinewidth": 1.2, "zorder": 4}
                _bar(one, at, row, "gap", fmt="x" if crossed else "o", **look)
                if row["gap_equal_updates"] is not None:
                    controlled = True
                    _bar(one, at + 0.2, row, "gap_equal_updates", fmt="o", mfc="white", alpha=0.6, **look)
            one.set_xticks(range(len(sets)), sets)
            one.set_xlim(-0.6, max(len(sets) - 0.4, 0.6))
            one.grid(visible=False, axis="x")
            one.set_xlabel(name)
            if not sets:
                nothing(one, "no pair of trials with a reset")
        axes[0].set_ylabel("generalisation gap, percentage points")
        counts = [row["pairs"] for row in compared.values()]
        axes[0].set_title(title_of(title, counts, "paired seed", 70))
        handles: list[Any] = [Line2D([], [], color=COLOURS[0], marker="o", label="gap to the fresh network")]
        handles.append(Line2D([], [], color=COLOURS[0], marker="o", ms=3, alpha=0.5, ls="", label="a seed"))
        if controlled:
            label = "to a fresh network after as many updates"
            handles.append(Line2D([], [], color=COLOURS[0], marker="o", mfc="white", alpha=0.6, label=label))
        if "none" in compared:
            handles.append(Line2D([], [], color=GREY, ls="--", label="pretrained, nothing reset"))
        if uncounted:
            handles.append(Line2D([], [], color=COLOURS[0], ls="", marker="x", mew=2, label="no verdict"))
        canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return canvas


def _bar(axes: "Axes", at: float, row: Mapping[str, Any], column: str, **look: Any) -> None:
    mean = 100 * row[column]
    low, high = (100 * end for end in row[f"{column}_ci95"] or (row[column],) * 2)
    axes.errorbar(at, mean, [[mean - low], [high - mean]], **look)


def training_speed(table: pd.DataFrame, setting: Setting, resets: Sequence[str], title: str) -> "Canvas":
    """The paper's figure 11: epochs of tuning to 99 % train accuracy, fresh and after the resets named.

    The setting holds one arm for each reset (`apart`).
    Dots: the seeds, as triangles where it was never reached within the tuning stage; markers with bars: median and
    its interval from order statistics, with an arrow where that is censored.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    found = pairing.epochs_to_accuracy(table, REACHED)
    fresh = next((arm["arm"] for arm in setting.arms if setting.is_fresh(arm["arm"])), None)
    by_reset = {arm.get("reset"): arm["arm"] for arm in setting.arms if not setting.is_fresh(arm["arm"])}
    wanted = {"fresh": fresh, **{name: by_reset[name] for name in [*resets, "none"] if name in by_reset}}
    names = {name: found[found["arm"] == arm] for name, arm in wanted.items()}
    with plain_style():
        canvas = Canvas(figsize=(7.5, 4.8), layout="constrained")
        axes = canvas.subplots()
        censored = intervals = False
        for at, (name, own) in enumerate(names.items()):
            colour = COLOURS[0] if name == "fresh" else COLOURS[1]
            for reached, marker in ((True, "o"), (False, "^")):
                epochs = own.loc[own["reached"] == reached, "epochs"]
                spread = at - 0.22 + 0.1 * ((np.arange(len(epochs)) * 0.618) % 1 - 0.5)
                axes.scatter(spread, epochs, s=12, lw=0, color=colour, alpha=0.45, marker=marker)
            if own.empty:
                continue
            censored |= not own["reached"].all()
            median = own["epochs"].median()
            interval = estimates.median_interval(own["epochs"].to_numpy())
            intervals |= interval is not None
            low, high = interval or (median, median)
            most = own.loc[~own["reached"], "epochs"].min()
            bars = [[median - low], [high - median]]
            axes.errorbar(at, median, bars, fmt="o", ms=7, capsize=4, color=colour, zorder=4, lolims=False)
            if high >= most:
                axes.plot(at, high, marker="^", ms=8, color=colour, zorder=5)
        labels = {"fresh": "fresh", "none": "nothing"}
        axes.set_xticks(range(len(names)), [labels.get(name, name) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("modules reset after pretraining (those before are kept)")
        axes.set_ylabel(f"epochs of tuning to {100 * REACHED:g} % train accuracy")
        shown = "median and 95 % interval" if intervals else "median"
        shown += f"; evaluated every {setting.eval_every} epochs" * (setting.eval_every > 1)
        axes.set_title(title_of(title, [len(own) for own in names.values()], "seed", 62, shown))
        handles = [
            Line2D([], [], color=COLOURS[0], marker="o", ls="", label="fresh"),
            Line2D([], [], color=COLOURS[1], marker="o", ls="", label="pretrained, then reset"),
        ]
        handles.append(Line2D([], [], color=GREY, marker="o", ms=3, alpha=0.6, ls="", label="a seed"))
        if censored:
            label = "never reached in the tuning stage"
            handles.append(Line2D([], [], color=GREY, marker="^", ls="", label=label))
        canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return canvas


def chunk_ends(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each stage of each sound trial, with `available`: examples seen so far, the stage's data set."""
    own = table[table["stage"] != CONTINUED].sort_values(["trial", "step"])
    own = own[~own["trial"].isin(own.loc[own["diverged"], "trial"])]
    ends = own.groupby(["trial", "stage"], sort=False).tail(1)
    before = ends.groupby("trial")["examples_seen"].shift(fill_value=0)
    size = (ends["examples_seen"] - before) / ends["epoch"]
    finished = ends.loc[ends["stage"] == TUNING, "trial"]
    return ends.assign(available=size.round().astype(int))[ends["trial"].isin(finished)]


def online_curves(table: pd.DataFrame, setting: Setting, title: str) -> "Canvas":
    """Test accuracy at the end of each stage against the examples available, warm and fresh; and the paired gap.

    Means over seeds with 95 % t intervals; on the right warm minus fresh, paired by seed, with a dot for each seed.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    ends = chunk_ends(table)
    stages = {name: own.set_index(["available", "seed"])["test_accuracy"] for name, own in ends.groupby("arm")}
    pairs = [(a["arm"], setting.fresh[a["arm"]]) for a in setting.arms if not setting.is_fresh(a["arm"])]
    pairs = [(warm, fresh) for warm, fresh in pairs if warm in stages and fresh in stages]
    with plain_style():
        canvas = Canvas(figsize=(11, 4.8), layout="constrained")
        curves, gaps = canvas.subplots(1, 2)
        handles: list[Line2D] = []
        values = {arm["arm"]: arm for arm in setting.arms}
        others = [name for name in setting.swept if name != "intervention"]
        for index, (warm, fresh) in enumerate(pairs):
            more = "" if len(pairs) == 1 else f": {combination(values[warm], others)}"
            for arm, kind, colour in ((fresh, "fresh", 2 * index), (warm, "warm", 2 * index + 1)):
                look: dict[str, Any] = {"color": COLOURS[colour % len(COLOURS)], "marker": MARKERS[colour % 7]}
                _chunk_line(curves, stages[arm], **look)
                handles.append(Line2D([], [], label=f"{kind} after each chunk{more}", **look))
            difference = (stages[warm] - stages[fresh]).dropna()
            _chunk_line(gaps, difference, color=COLOURS[(2 * index + 1) % len(COLOURS)], marker=MARKERS[0])
            if len(pairs) == 1:
                dots = 100 * difference
                gaps.scatter(dots.index.get_level_values(0), dots, s=8, lw=0, color=COLOURS[1], alpha=0.35)
        if not pairs:
            for one in (curves, gaps):
                nothing(one, "no pair of trials, warm and fresh")
        gaps.axhline(0, color="black", lw=1, zorder=1)
        curves.set_ylabel("test accuracy, %")
        gaps.set_ylabel("gap: warm minus fresh, percentage points")
        for one in (curves, gaps):
            one.set_xlabel("training examples seen so far")
        counts = ends.groupby("arm")["seed"].nunique()
        curves.set_title(title_of(title, counts.tolist(), "seed", 60))
        gaps.set_title("paired by seed; dots: the seeds" if len(pairs) == 1 else "paired by seed")
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2) or 1)
    return canvas


def _chunk_line(axes: "Axes", values: pd.Series, **look: Any) -> None:
    groups = list(values.groupby(level=0))
    at = [available for available, _ in groups]
    means, below, above = np.array([_estimate(own.to_numpy()) for _, own in groups]).reshape(-1, 3).T
    axes.errorbar(at, means, [below, above], capsize=3, elinewidth=1.2, ms=6, zorder=4, **look)
