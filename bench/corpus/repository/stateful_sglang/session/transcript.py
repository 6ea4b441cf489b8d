"""The session's tokens, exactly as computed: one growing array, four bytes a token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

_CHUNK = 4096
"""Tokens compared at once: slices of arrays compare at memory speed, elements do not."""


class Transcript:
    """Append-only tokens, typecode ``'i'``; what a turn left behind is cut with `truncate`."""

    __slots__ = ("_tokens",)

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i", tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens, in time proportional to how many are new."""
        self._tokens.extend(array("i", tokens))

    def truncate(self, length: int) -> None:
        """Drop every token from position `length` on.

        Raises:
            ValueError: `length` is negative or lies beyond the end.
        """
        if not 0 <= length <= len(self._tokens):
            raise ValueError(
                f"cannot truncate to {length} tokens: the transcript holds {len(self._tokens)}"
            )
        del self._tokens[length:]

    def slice(self, start: int, stop: int | None = None) -> array[int]:
        """A copy of the tokens in ``[start, stop)``; `stop` defaults to the end."""
        return self._tokens[start:stop]

    def last(self) -> int | None:
        """The last token, or None where there is none yet."""
        return self._tokens[-1] if self._tokens else None

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many leading tokens `tokens` shares with the transcript."""
        other = array("i", tokens)
        limit = min(len(self._tokens), len(other))
        start = 0
        while start < limit:
            stop = min(start + _CHUNK, limit)
            if self._tokens[start:stop] != other[start:stop]:
                break
            start = stop
        while start < limit and self._tokens[start] == other[start]:
            start += 1
        return start
