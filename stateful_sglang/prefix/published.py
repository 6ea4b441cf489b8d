"""What is published: prefixes whose KV requests of all salts share.

Knows neither SGLang nor KV. Ranks that get the same changes in the same order decide alike.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

MAX_PREFIXES = 64
"""Each request's tokens are compared with all of them."""


class Published(NamedTuple):
    """A published prefix as a rank keeps it."""

    tokens: array[int]
    """Typecode 'q': those that its open units stand for, and no more."""
    units: int
    """Units of a tree key that are open: whole pages."""


class PublishedPrefixes:
    """The published prefixes of one rank, within a budget."""

    def __init__(self, budget: int = 0) -> None:
        """``budget`` is how many units all of them may have together."""
        self.budget = budget
        self._by_id: dict[str, Published] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def units(self) -> int:
        """Units of all of them, shared ones counted as often as they are shared."""
        return sum(each.units for each in self._by_id.values())

    def problem(self, units: int) -> str | None:
        """Why a prefix of so many units can't be published beside the others; None: it can."""
        if not units:
            return "it is shorter than a page of the KV pool, so that nothing of it can be shared"
        if len(self) >= MAX_PREFIXES:
            return f"{MAX_PREFIXES} prefixes are published, the most there may be; remove one"
        if self.units + units > self.budget:
            return (
                f"it takes {units} tokens of the KV pool, and {max(0, self.budget - self.units)} "
                f"are left of the {self.budget} that --publish-budget allows; remove another, or "
                "raise the budget"
            )
        return None

    def add(self, prefix_id: str, tokens: array[int], units: int) -> None:
        """Publish a prefix; `problem` has been asked before."""
        self._by_id[prefix_id] = Published(tokens, units)

    def remove(self, prefix_id: str) -> None:
        """Forget a prefix, if it is published."""
        self._by_id.pop(prefix_id, None)

    def open_units(self, tokens: array[int]) -> int:
        """Units of the longest published prefix that these tokens begin with; 0: of none."""
        best = 0
        for each in self._by_id.values():
            if each.units > best and tokens[: len(each.tokens)] == each.tokens:
                best = each.units
        return best
