"""The drafts of one transcript: a source, the width and what was learnt, behind three verbs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stateful_sglang.draft.cost import VerifyCost
from stateful_sglang.draft.sources.base import NO_DRAFT, Draft, DraftSource
from stateful_sglang.draft.width import WidthPolicy


class Drafter:
    """Drafts continuations of one transcript: `follow` it, `draft`, `follow` what was generated."""

    __slots__ = ("_max_draft", "_offer", "_policy", "_source")

    def __init__(self, source: DraftSource, max_draft: int, cost: VerifyCost) -> None:
        if max_draft < 0:
            raise ValueError(f"max_draft is {max_draft}: expected 0 (never draft) or more")
        self._source = source
        self._policy = WidthPolicy(source.priors, cost)
        self._max_draft = max_draft
        self._offer: Draft = NO_DRAFT

    def __len__(self) -> int:
        return len(self._source)

    @property
    def nbytes(self) -> int:
        """Memory held by the source, in bytes."""
        return self._source.nbytes

    def follow(self, tokens: Sequence[int]) -> None:
        """The transcript went on with `tokens`; scores what was offered last."""
        offer = self._offer
        if offer.tokens:
            self._policy.observe(offer, tokens[: len(offer.tokens) + 1])
            self._offer = NO_DRAFT
        self._source.follow(tokens)

    def common_prefix(self, tokens: NDArray[np.int64]) -> int:
        """How many tokens of the transcript `tokens` begins with."""
        return self._source.common_prefix(tokens)

    def truncate(self, length: int) -> None:
        """The transcript was cut to `length` tokens; does nothing if it is not longer."""
        self._offer = NO_DRAFT
        self._source.truncate(length)

    def draft(self, room: int) -> list[int]:
        """Tokens to verify after the transcript's end: at most `room`, often none."""
        # Kept whole: a plain step teaches what a draft would have been worth.
        offer = self._offer = self._source.draft(self._max_draft)
        return list(offer.tokens[: self._policy.width(offer, room)])
