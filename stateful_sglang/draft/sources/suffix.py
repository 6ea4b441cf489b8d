"""Drafts what followed the longest suffix of the transcript when it was said before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stateful_sglang.draft.automaton import SuffixAutomaton
from stateful_sglang.draft.sources.base import NO_DRAFT, Draft, DraftSource, Prior

_BOUNDS = (2, 3, 5, 9)
"""Match lengths of one grade: 1, 2, 3-4, 5-8, 9 and more."""


def grade(match_length: int) -> int:
    """The grade of a draft after a match of so many tokens, at least 1."""
    return bisect_right(_BOUNDS, match_length)


class SuffixSource(DraftSource):
    """A suffix automaton over the transcript."""

    __slots__ = ("_automaton",)

    priors: ClassVar[tuple[Prior, ...]] = (
        Prior(0.30, 0.60),
        Prior(0.45, 0.70),
        Prior(0.60, 0.80),
        Prior(0.75, 0.85),
        Prior(0.90, 0.93),
    )

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()

    def __len__(self) -> int:
        return len(self._automaton)

    @property
    def nbytes(self) -> int:
        """The automaton's, some 150 bytes a token."""
        return self._automaton.nbytes

    def follow(self, tokens: Sequence[int]) -> None:
        """Amortised O(1) a token."""
        self._automaton.extend(tokens)

    def truncate(self, length: int) -> None:
        """O(1) a token taken back."""
        self._automaton.truncate(length)

    def common_prefix(self, tokens: NDArray[np.int64]) -> int:
        """Compares all tokens that both have."""
        held = np.frombuffer(self._automaton.tokens(0, len(tokens)), dtype=np.intc)
        differs = np.flatnonzero(held != tokens[: len(held)])
        return int(differs[0]) if len(differs) else len(held)

    def draft(self, max_tokens: int) -> Draft:
        """The continuation of the most recent longest match: `max_tokens` tokens, or none."""
        length, start = self._automaton.match()
        if not length or max_tokens <= 0:
            return NO_DRAFT
        found = self._automaton.continuation(start, max_tokens)
        return Draft(tuple(found), grade(length))
