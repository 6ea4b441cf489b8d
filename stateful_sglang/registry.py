"""Named choices of one kind: a new one is a file of its own and one line in its registry.

Nothing is imported before it is chosen, so the command line lists all choices at once and a choice
may need what others do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, NamedTuple, TypeVar, cast

T = TypeVar("T")


class Entry(NamedTuple):
    """One line of a registry."""

    place: str
    """``module.name``, seen from the registry's package."""
    summary: str
    """What it is, in words that can stand in ``--help``."""


class Registry(Mapping[str, Entry], Generic[T]):
    """What can be chosen by name; the names are the choices on the command line."""

    def __init__(self, kind: str, package: str, entries: Mapping[str, Entry]) -> None:
        """``kind`` is what errors call an entry, ``package`` where the places begin."""
        self._kind = kind
        self._package = package
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> T:
        """Import what ``name`` stands for.

        Raises:
            ValueError: There is no such choice; the message names those there are.
        """
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise ValueError(f"no {self._kind} is called {name!r}; there are: {known}")
        module, _, attribute = self._entries[name].place.rpartition(".")
        return cast(T, getattr(import_module(f"{self._package}.{module}"), attribute))

    def summaries(self) -> str:
        """All choices and what they are, on one line."""
        return "; ".join(f"{name}: {entry.summary}" for name, entry in self._entries.items())
