"""The drafts of one transcript: lookup, width and what was learnt, behind three verbs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .index import SuffixIndex
from .select import VerifyCost, WidthPolicy


class Drafter:
    """Drafts continuations of one transcript: `follow` it, `draft`, `follow` what was generated."""

    __slots__ = ("_index", "_max_draft", "_offer", "_policy")

    def __init__(self, max_draft: int, cost: VerifyCost) -> None:
        self._index = SuffixIndex()
        self._policy = WidthPolicy(max_draft, cost)
        self._max_draft = max_draft
        self._offer: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Memory held by the index, in bytes."""
        return self._index.nbytes

    def follow(self, tokens: Sequence[int]) -> None:
        """The transcript went on with `tokens`; scores what was offered last."""
        if self._offer is not None:
            length, offered = self._offer
            self._policy.observe(length, offered, list(tokens[: len(offered) + 1]))
            self._offer = None
        self._index.extend(tokens)

    def common_prefix(self, tokens: NDArray[np.int64]) -> int:
        """How many tokens of the transcript `tokens` begins with."""
        held = np.frombuffer(self._index.tokens(0, len(tokens)), dtype=np.intc)
        differs = np.flatnonzero(held != tokens[: len(held)])
        return int(differs[0]) if len(differs) else len(held)

    def truncate(self, length: int) -> None:
        """The transcript was cut to `length` tokens; does nothing if it is not longer."""
        self._offer = None
        self._index.truncate(length)

    def draft(self, room: int) -> list[int]:
        """Tokens to verify after the transcript's end: at most `room`, often none."""
        length = self._index.match().length
        offered = self._index.draft(self._max_draft)
        # Kept whole: a plain step teaches what a draft would have been worth.
        self._offer = (length, offered)
        return offered[: self._policy.width(length, room)]
