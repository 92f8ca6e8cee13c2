"""The verdicts on the claims as tables: plain text for a terminal, Markdown for a page of results."""

from collections.abc import Sequence
from typing import Any

_ALWAYS = ("train_examples", "label_noise", "depth", "width")  # named where they are not 0
Row = dict[str, Any]


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.2f}"


def _estimate(row: Row, name: str) -> str:
    """An effect with its interval: percentage points, or percent of the epochs; `?` where censoring leaves it open."""
    interval = row[f"{name}_ci95"]
    if row[name] is None and interval is None:
        return "-"
    unit = " %" if row["unit"] == "ratio" else ""
    ends = f" [{_percent(interval[0])}, {_percent(interval[1])}]" if interval else ""
    return f"{_percent(row[name])}{ends}{unit}"


def _settings(rows: Sequence[Row]) -> list[str]:
    """Each row's setting in words: what is always named, and what tells the rows of one claim apart."""
    found = []
    for row in rows:
        own = {n: value for n, value in row["setting"].items() if n not in ("model", "dataset")}
        others = [other["setting"] for other in rows if other["claim"] == row["claim"]]
        differs = {n for n in own if len({repr(other.get(n)) for other in others}) > 1}
        values = [f"{n}={value}" for n, value in own.items() if n in differs or (n in _ALWAYS and value)]
        found.append(f"{row['model']} on {row['dataset']}" + f" ({', '.join(values)})" * bool(values))
    return found


def _seeds(row: Row) -> str:
    alone, together = (row[name] or "-" for name in ("seeds_needed", "seeds_needed_in_table"))
    return f"{alone} ({together})"


def _p(row: Row) -> str:
    """The adjusted p-value nearer to a verdict."""
    value = min(row["p_support_holm"], row["p_refute_holm"])
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _untested(verdicts: dict[str, Any]) -> str:
    claims = [f"{claim['text']} (figure {claim['figure']})" for claim in verdicts["untested"]]
    return "Not tested, for lack of a run: " + "; ".join(claims) + "." if claims else ""


_HEADS = ("p", "fit %", "at equal updates [95 %]", "pairs", "seeds needed")


def _cells(row: Row) -> list[str]:
    fit = "-" if row["fit"] is None else f"{100 * row['fit']:.1f}"
    return [_p(row), fit, _estimate(row, "equal_updates"), str(row["pairs"]), _seeds(row)]


def terminal(verdicts: dict[str, Any]) -> str:
    """The table of `verdicts.judge` as plain ASCII, refutations first; effects in percentage points."""
    rows = verdicts["rows"]
    table = [["verdict", "figure", "claim", "effect [95 %]", *_HEADS, "setting"]]
    for row, setting in zip(rows, _settings(rows), strict=True):
        estimate = _estimate(row, "effect")
        table.append([row["verdict"], row["figure"], row["claim"], estimate, *_cells(row), setting])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "-" * max(map(len, lines)))
    notes = [f"{row['claim']}: {note}." for row in rows for note in row["notes"]]
    return "\n".join([*lines, *dict.fromkeys(notes), *filter(None, [_untested(verdicts)])]) + "\n"


def markdown(verdicts: dict[str, Any]) -> str:
    """The same in Markdown, with each claim's own words; to be read with docs/reading_results.md."""
    rows = verdicts["rows"]
    heads = ["verdict", "figure", "claim", "setting", "shown", "effect [95 %]", *_HEADS, "notes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row, setting in zip(rows, _settings(rows), strict=True):
        shown, estimate, notes = row["shown"], _estimate(row, "effect"), "; ".join(row["notes"])
        cells = [f"**{row['verdict']}**" + row["says"].removeprefix(row["verdict"]), row["figure"], row["text"]]
        cells += [setting, shown, estimate, *_cells(row), notes]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    words = (
        "Effects in percentage points of test accuracy, or percent of the epochs (%); `p` is the smaller of Holm's "
        f"adjusted p-values over all {len(rows)} rows. Fit is the lowest arm's. Seeds for 80 % power: for the row "
        "alone (for the first step of this table's correction)."
    )
    return "\n".join([*lines, "", words, *filter(None, ["", _untested(verdicts)])]).rstrip() + "\n"
