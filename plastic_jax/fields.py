"""Fields, which can be set, and columns, which are measured: each declared once, with its meaning."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

from plastic_jax.errors import InputError


@dataclass(frozen=True)
class Column:
    """A column that a diagnostic fills: its name, what it says, and whether it is a share, shown in percent."""

    name: str
    doc: str
    share: bool = False


@dataclass(frozen=True)
class Field:
    """A field of the config; its type is that of its default.

    `kind`: *static* changes the compiled program, *dynamic* is an array with a trial axis (both can be swept), *run* is
    one value for the whole run. `low` and `high` are allowed themselves, `above` is not. `choices` may be a function,
    where there can be more of them later.

    `off` is for a field of a method: the value with which the method does nothing. A method of which no field with an
    `off` has another value is off, and its other fields are then without effect.

    `hints` says what to set instead of some values that it does not take. `read` brings a text into its one spelling,
    or raises ValueError; `takes` says in words what it takes.
    """

    default: Any
    kind: str
    doc: str
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    off: Any = None
    hints: Mapping[str, str] = dataclass_field(default_factory=dict, hash=False)
    read: Callable[[str], str] | None = None
    takes: str | Callable[[], str] | None = None
    name: str = ""

    @property
    def type(self) -> type:
        """That of its values."""
        return type(self.default)

    @property
    def swept(self) -> bool:
        """Whether it may have several values in a run."""
        return self.kind in ("static", "dynamic")

    def named(self, name: str) -> "Field":
        """The same with its name."""
        return replace(self, name=name)

    def one_of(self) -> tuple[str, ...] | None:
        """The values that it may have, None where they are not a list."""
        return self.choices() if callable(self.choices) else self.choices

    def allowed(self) -> str:
        """What it takes, in words: `a whole number of at least 1`."""
        if self.takes:
            return self.takes() if callable(self.takes) else self.takes
        if choices := self.one_of():
            return "one of " + ", ".join(choices)
        if self.type is bool:
            return "True or False"
        if self.type is str:
            return "a name"
        whole = self.type is int
        words = "a whole number" if whole else "a number"
        if self.above is not None:
            words += f" above {self.above:g}"
        if self.low is not None:
            words += f" from {self.low:g}" if self.high is not None else f" of at least {self.low:g}"
        high = "" if self.high is None else f" to {self.high}" if whole else f" to {self.high:g}"
        return words + high

    def refuse(self, value: Any) -> InputError:
        """The error that says what the field takes."""
        near = difflib.get_close_matches(str(value), self.one_of() or (), n=1)
        hint = self.hints.get(str(value)) or (f"did you mean {near[0]}?" if near else "")
        words = f"--config.{self.name}={value!r} is not allowed: {self.name} takes {self.allowed()}"
        return InputError(f"{words}; {hint}" if hint.endswith("?") else f"{words}; {hint}." if hint else f"{words}.")

    def check(self, value: Any) -> Any:
        """`value` in the field's own type and spelling.

        Raises:
          InputError: it is not allowed.
        """
        if self.type is bool:
            return self._switch(value)
        if self.type is str:
            return self._text(value)
        if isinstance(value, bool) or not isinstance(value, int if self.type is int else (int, float)):
            raise self.refuse(value)
        if not math.isfinite(value) or (self.type is int and value > 2**31 - 1):
            raise self.refuse(value)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise self.refuse(value)
        if self.above is not None and value <= self.above:
            raise self.refuse(value)
        return self.type(value)

    def _switch(self, value: Any) -> bool:
        named = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in named:
            return named[value.lower()]
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value

    def _text(self, value: Any) -> str:
        if self.read and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # --config.reset=6 comes as a number
        if not isinstance(value, str) or not value:
            raise self.refuse(value)
        if self.read:
            try:
                return self.read(value)
            except ValueError:
                raise self.refuse(value) from None
        choices = self.one_of()
        if choices and value not in choices:
            raise self.refuse(value)
        return value
