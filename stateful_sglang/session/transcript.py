"""The session's tokens, exactly as computed: four bytes each, shared by versions and forks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from stateful_sglang.session.shared import Shared

_CHUNK = 4096
"""Tokens compared at once: slices of arrays compare at memory speed, elements do not."""


class Transcript(Shared[int]):
    """Immutable tokens, typecode ``'i'``; see `Shared` for what growing and cutting cost."""

    __slots__ = ()

    @staticmethod
    def _stored(items: Iterable[int]) -> array[int]:
        return array("i", items)

    def slice(self, start: int, stop: int | None = None) -> array[int]:
        """A copy of the tokens in ``[start, stop)``; `stop` defaults to the end."""
        tokens = super().slice(start, stop)
        assert isinstance(tokens, array)
        return tokens

    def wide(self, start: int = 0, stop: int | None = None) -> array[int]:
        """The same copy in typecode ``'q'``, as requests carry tokens, at memory speed too."""
        tokens = self.slice(start, stop)
        wide = array("q", bytes(8 * len(tokens)))
        if tokens:
            np.frombuffer(wide, np.int64)[:] = np.frombuffer(tokens, np.intc)
        return wide

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many leading tokens `tokens` shares with the transcript."""
        if isinstance(tokens, Transcript):
            other = tokens.slice(0, len(self))
        else:
            other = array("i", tokens[: len(self)])
        mine = self.slice(0, len(other))
        limit = len(mine)
        start = 0
        while start < limit:
            stop = min(start + _CHUNK, limit)
            if mine[start:stop] != other[start:stop]:
                break
            start = stop
        while start < limit and mine[start] == other[start]:
            start += 1
        return start
