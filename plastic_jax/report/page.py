"""What a run shows: its result in words, the gap table and one self-contained page."""

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plastic_jax import files
from plastic_jax.report.figures import accuracy_curves, gap_curve
from plastic_jax.report.style import WARM_START, Figure, combination, longest, save_figure, value_text
from plastic_jax.results import settings
from plastic_jax.results.settings import Setting

__all__ = [
    "Figure",
    "accuracy_curves",
    "gap_curve",
    "headlines",
    "markdown_table",
    "not_reached",
    "page",
    "save_figure",
    "terminal_table",
]


def _points(value: float | None, *, sign: bool = True, digits: int = 2) -> str:
    """A fraction as percent or percentage points, with a true minus sign; '-' for null."""
    if value is None:
        return "-"
    return f"{100 * value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _measured(value: float | None, share: bool) -> str:
    """A diagnostic's mean: a share in percent, else a number of four digits; '-' for null."""
    return "-" if value is None else f"{100 * value:.1f}" if share else f"{value:.4g}"


def _estimate(gap: float | None, interval: Sequence[float] | None) -> str:
    if gap is None or interval is None:
        return _points(gap)
    return f"{_points(gap)} [{_points(interval[0])}, {_points(interval[1])}]"


def headlines(summary: Sequence[dict[str, Any]], setting: Setting) -> list[str]:
    """The result in words: a sentence for each arm with the longest warm start.

    (For every compared arm, where that length is not swept.) Where those are more than four, one
    sentence counts the verdicts instead, so that no arm is picked by its result.
    """
    rows = {row["arm"]: row for row in summary}
    chosen = [rows[arm["arm"]] for arm in longest(setting)]
    if len(chosen) <= 4:
        return [_sentence(row, setting) for row in chosen]
    count = {
        words: sum(row["verdict"] == verdict for row in chosen)
        for verdict, words in (
            ("worse", "generalise worse than their fresh arm"),
            ("better", "generalise better"),
            ("undecided", "cannot be told from it"),
            ("not fitted", "do not fit their data"),
            (None, "have no verdict yet"),
        )
    }
    parts = ", ".join(f"{number} {words}" for words, number in count.items() if number)
    gaps = [row["gap"] for row in chosen if row["gap"] is not None]
    span = f" Gaps from {_points(min(gaps))} to {_points(max(gaps))} points." if gaps else ""
    return [f"Of {len(chosen)} arms {parts}.{span}"]


def _sentence(row: dict[str, Any], setting: Setting) -> str:
    who = f"{row['arm']}: "
    if (length := row.get(WARM_START)) is not None:
        others = combination(row, [field for field in setting.swept if field != WARM_START])
        who = f"After a warm start of {value_text(length)} epochs{f' ({others})' * bool(others)}, "
    gap, interval, pairs = row["gap"], row["gap_ci95"], row["pairs"]
    if gap is None:
        return f"{who}no pair of trials has finished yet."
    if interval is None:
        few = f"{pairs} pair{'s' * (pairs > 1)}"
        return f"{who}the gap is {_points(gap)} percentage points from {few}, too few to judge."
    if row["verdict"] in ("worse", "better"):
        low, high = sorted(map(abs, interval))
        text = (
            f"the network generalises {row['verdict']} than a fresh one: test accuracy is "
            f"{_points(abs(gap), sign=False)} percentage points "
            f"{'lower' if gap < 0 else 'higher'} (95 % interval {_points(low, sign=False)} to "
            f"{_points(high, sign=False)}, {pairs} paired seeds)."
        )
    else:
        reason = {
            "undecided": "no difference from a fresh network can be told",
            "not fitted": "the networks do not fit their training data, so this does not count",
            None: "too many trials diverged to judge",
        }[row["verdict"]]
        text = (
            f"{reason}: the gap is {_points(gap)} percentage points (95 % interval "
            f"{_points(interval[0])} to {_points(interval[1])}, {pairs} paired seeds)."
        )
    if row["gap_equal_updates"] is None:
        return who + text
    control = _estimate(row["gap_equal_updates"], row["gap_equal_updates_ci95"])
    return f"{who}{text} Against a fresh network after as many updates: {control} points."


def not_reached(summary: Sequence[dict[str, Any]]) -> str:
    """How many trials have a stage that its cap ended before its accuracy was reached; '' for none."""
    missed = sum(row["unreached"] for row in summary)
    if not missed:
        return ""
    trials = sum(row["trials"] for row in summary)
    have = "has" if missed == 1 else "have"
    return f"Not reached: {missed} of {trials} trials {have} a stage that its cap ended below stage_accuracy"


_Columns = dict[str, list[str]]


def _columns(summary: Sequence[dict[str, Any]], setting: Setting, *, full: bool) -> _Columns:
    """The gap table as heading -> cells; `full` adds what the terminal has no room for."""

    def cells(column: str, digits: int = 2) -> list[str]:
        return [_points(row[column], sign=False, digits=digits) for row in summary]

    def estimates(column: str) -> list[str]:
        return [_estimate(row[column], row[f"{column}_ci95"]) for row in summary]

    compared = [not setting.is_fresh(row["arm"]) for row in summary]
    columns = {field: [value_text(row[field]) for row in summary] for field in setting.swept}
    if full:
        columns["trials"] = [str(row["trials"]) for row in summary]
    columns["pairs"] = [str(row["pairs"]) if here else "-" for row, here in zip(summary, compared, strict=True)]
    if any(row["diverged"] for row in summary):
        columns["diverged"] = [str(row["diverged"]) for row in summary]
    if any(row["unreached"] for row in summary):
        columns["not reached"] = [str(row["unreached"]) for row in summary]
    columns["test %"] = cells("test_accuracy")
    if any("validation_accuracy" in row for row in summary):
        columns["held-back %"] = cells("validation_accuracy")
    if full:
        columns["train %"] = cells("train_accuracy", digits=1)
    columns["fit %"] = cells("fit_accuracy", digits=1)
    if full:
        columns["lowest fit %"] = cells("min_fit_accuracy", digits=1)
    for column in setting.diagnostics:
        heading = column.name.replace("_", " ") + " %" * column.share
        columns[heading] = [_measured(row.get(column.name), column.share) for row in summary]
    columns["gap [95 %]"] = estimates("gap")
    if full and any(row["gap_bootstrap_ci95"] for row in summary):
        columns["bootstrap [95 %]"] = [
            _estimate(row["gap"], row["gap_bootstrap_ci95"]).partition(" ")[2] or "-" for row in summary
        ]
    if any(row["gap_equal_updates"] is not None for row in summary):
        columns["at equal updates [95 %]"] = estimates("gap_equal_updates")
    columns["verdict"] = [
        (row["verdict"] or "-") if here else "fresh" for row, here in zip(summary, compared, strict=True)
    ]
    return columns


def terminal_table(summary: Sequence[dict[str, Any]], setting: Setting) -> str:
    """The gap table as plain ASCII: accuracies in percent, gaps in percentage points."""
    cells = _columns(summary, setting, full=False)
    # headings broken over lines, so that a column is as narrow as its values
    heads = {name: name.split("_") if name in setting.swept else [name] for name in cells}
    heads |= {name: ["at equal", "updates [95 %]"] for name in cells if name.startswith("at equal")}
    heads |= {name: name.split() for name in cells if name == "not reached"}
    height = max(map(len, heads.values()))
    columns = []
    for name, values in cells.items():
        lines = [""] * (height - len(heads[name])) + heads[name] + values
        width = max(map(len, lines))
        texts = name == "verdict" or any(isinstance(row.get(name), str) for row in summary)
        columns.append([line.ljust(width) if texts else line.rjust(width) for line in lines])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    lines.insert(height, "-" * max(map(len, lines)))
    lines.append("gap: test accuracy minus the fresh arm's, paired by seed, in percentage points")
    if missed := not_reached(summary):
        lines.append(missed)
    return "\n".join(lines).replace("\N{MINUS SIGN}", "-") + "\n"


def markdown_table(summary: Sequence[dict[str, Any]], setting: Setting) -> str:
    """The columns of `terminal_table` as Markdown, in plain ASCII."""
    cells = _columns(summary, setting, full=False)
    rows = [[name.replace("_", " ") for name in cells], ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines).replace("\N{MINUS SIGN}", "-") + "\n"


_TEMPLATE = Path(__file__).with_name("page.html")


def page(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    summary: Sequence[dict[str, Any]],
    setting: Setting,
    figures: Sequence[Figure],
    config: dict[str, Any],
    versions: dict[str, Any],
    device: str,
    command: str,
    notes: Sequence[str],
) -> Path:
    """Write WORKDIR/report.html, a self-contained file, and return its path.

    Figures are read from their paths and embedded; every text is escaped. `config` may be nested.
    """
    import jinja2

    columns = _columns(summary, setting, full=True)
    # the result first: a phone shows the left of a wide table
    names = sorted(columns, key=lambda n: not (n in setting.swept or n.endswith("]") or n == "verdict"))
    rows = zip(*(columns[name] for name in names), strict=True)
    text = {n for n in names if any(isinstance(row.get(n), str) for row in summary)} | {"verdict"}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    content = environment.from_string(_TEMPLATE.read_text()).render(
        title=title,
        headlines=headlines(summary, setting),
        notes=notes,
        warm=WARM_START in setting.swept,
        epochs=setting.metric_epochs,
        fitted=f"{100 * settings.FITTED:g}",
        least=settings.LEAST_PAIRS_T,
        bootstrap="bootstrap [95 %]" in columns,
        controlled="at equal updates [95 %]" in columns,
        missed=not_reached(summary),
        figures=[{"caption": f.caption, "data": base64.b64encode(f.path.read_bytes()).decode()} for f in figures],
        columns=names,
        left=text,
        rows=[dict(zip(names, cells, strict=True)) for cells in rows],
        command=command,
        device=device,
        config=_flat(config),
        versions=_flat(versions),
    )
    path = Path(workdir) / "report.html"
    files.replace_file(path, content.encode())
    return path


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested dict as dotted names and values as text."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
