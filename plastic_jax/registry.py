"""Registries: the things of one kind, each a file of its own and a word in a list."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from plastic_jax.errors import InputError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """The entries by name, in the order of the list, then those that were added.

    A file's entry is imported when it is first asked for.

    Args:
      kind: what the entries are, in words.
      room: the package that the files are in; of several, the first that has the file.
      words: the names, which are those of the files.
      called: what a file calls its entry.
    """

    def __init__(self, kind: str, room: str | tuple[str, ...], words: tuple[str, ...], called: str = "ENTRY"):
        self.kind, self._words, self._called = kind, words, called
        self._rooms = (room,) if isinstance(room, str) else room
        self._found: dict[str, Entry] = {}
        self._added: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """All names; imports nothing."""
        return (*self._words, *self._added)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._found:
            if name not in self._words:
                raise KeyError(name)
            self._found[name] = self._imported(name)
        return self._found[name]

    def _imported(self, name: str) -> Entry:
        *others, last = self._rooms
        for room in others:
            try:
                return getattr(importlib.import_module(f"{room}.{name}"), self._called)
            except (ModuleNotFoundError, AttributeError):  # not there, or somebody else's package
                continue
        return getattr(importlib.import_module(f"{last}.{name}"), self._called)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def require(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
          InputError: there is none.
        """
        if name not in self.names:
            raise InputError(f"{self.kind} is {name!r}; it must be one of {', '.join(self.names)}.")
        return self[name]

    def add(self, name: str, entry: Entry) -> None:
        """Take in an entry from elsewhere.

        Raises:
          InputError: the name is taken, or is no name.
        """
        if not name.isidentifier():
            raise InputError(f"the {self.kind} {name!r} is not allowed: a name has only letters, digits and _.")
        if name in self.names:
            raise InputError(f"the {self.kind} {name!r} is declared twice: there is one of that name already.")
        self._found[name] = entry
        self._added.append(name)

    def remove(self, name: str) -> None:
        """Forget an entry that was added."""
        self._added.remove(name)
        del self._found[name]
