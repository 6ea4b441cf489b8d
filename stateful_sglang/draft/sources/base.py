"""What a draft source does: follow one transcript, and say what may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Prior(NamedTuple):
    """What a draft is worth before any was seen to hold or to fail."""

    first: float
    """Chance that its first token is what comes."""
    next: float
    """Chance that each further one is, after its predecessor was."""


class Draft(NamedTuple):
    """What may come next."""

    tokens: tuple[int, ...]
    grade: int
    """How sure the source is, as an index into its `priors`; the success of each grade is learnt
    apart. What tells good drafts from bad ones (length of a match, kind of text, origin) belongs
    into it."""


NO_DRAFT = Draft((), 0)


class DraftSource(ABC):
    """Drafts for one transcript, which it is told as it grows. One owner; not thread-safe.

    A draft is a guess: wrong tokens cost time, never correctness. Tokens are non-negative and below
    2**31.
    """

    __slots__ = ()

    priors: ClassVar[tuple[Prior, ...]]
    """One for each grade."""

    @abstractmethod
    def __len__(self) -> int:
        """Tokens of the transcript."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, in bytes; asked often, so O(1)."""

    @abstractmethod
    def follow(self, tokens: Sequence[int]) -> None:
        """The transcript went on with `tokens`."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """The transcript was cut to `length` tokens; does nothing if it is not longer.

        Raises:
            ValueError: `length` is negative.
        """

    @abstractmethod
    def common_prefix(self, tokens: NDArray[np.int64]) -> int:
        """How many tokens of the transcript `tokens` [any length] begins with. Changes nothing."""

    @abstractmethod
    def draft(self, max_tokens: int) -> Draft:
        """At most `max_tokens` tokens that may come next; `NO_DRAFT` where nothing is known.

        Called at every decode step. Changes nothing.
        """
