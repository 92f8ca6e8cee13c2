"""The table of the config's fields in docs/config.md, made from their declarations.

    python -m plastic_jax.running.flags_table

rewrites it between its marks.
"""

from pathlib import Path

from plastic_jax.errors import InputError
from plastic_jax.study.config import FIELDS, allowed

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
START, END = "<!-- flags -->", "<!-- /flags -->"


def markdown() -> str:
    """One row a field, in the order of declaration: field, default, kind, what it takes, meaning."""
    rows = [("field", "default", "swept", "allowed", "meaning"), ("---",) * 5]
    for name, spec in FIELDS.items():
        rows.append((f"`{name}`", f"`{spec.default}`", spec.kind, allowed(name), spec.doc))
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows)


def rewritten(text: str) -> str:
    """`text` with the current table between its two marks.

    Raises:
      InputError: the marks do not stand there once each and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in after or END in before + after:
        raise InputError(f"{PAGE} must have {START} and {END} once each, in this order.")
    return f"{before}{START}\n{markdown()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
