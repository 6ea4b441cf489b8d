"""How many tokens of a draft to verify.

`k` tokens are worth their place when the tokens they are expected to add outweigh what verifying
them costs. The expectation is learnt for each transcript from how drafts of a grade fared; the cost
belongs to the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from stateful_sglang.draft.cost import VerifyCost
from stateful_sglang.draft.sources.base import Draft, Prior

_MEMORY = 0.12
"""Weight of the newest observation: some eight rejections silence a grade, and, since plain steps
are scored as well, as few hits bring it back."""


class WidthPolicy:
    """Chooses draft widths for one transcript; adapts to how its drafts fare."""

    __slots__ = ("_cost", "_first", "_next")

    def __init__(self, priors: Sequence[Prior], cost: VerifyCost) -> None:
        """`priors` has one entry for each grade of the source."""
        self._cost = cost
        self._first = [prior.first for prior in priors]
        self._next = [prior.next for prior in priors]

    def width(self, draft: Draft, room: int) -> int:
        """Tokens of `draft` to verify, at most `room`.

        0 is a normal answer: there is no draft, or no width is expected to pay.
        """
        if not draft.tokens:
            return 0
        chance, keep = self._first[draft.grade], self._next[draft.grade]
        cost = 1.0 + self._cost.fixed
        tokens, best, width = 1.0, 1.0, 0
        for k in range(1, min(len(draft.tokens), room) + 1):
            tokens += chance
            cost += self._cost.per_token
            chance *= keep
            if tokens > best * cost:
                best, width = tokens / cost, k
        return width

    def observe(self, draft: Draft, emitted: Sequence[int]) -> None:
        """Score `draft` against the tokens that were generated in its place.

        It may be longer than what was verified, and nothing need have been verified at all: what a
        plain step generated tells as much about the first token.
        """
        if not draft.tokens or not emitted:
            return
        grade = draft.grade
        hit = draft.tokens[0] == emitted[0]
        self._first[grade] += _MEMORY * (hit - self._first[grade])
        if not hit:
            return
        for guess, token in zip(draft.tokens[1:], emitted[1:], strict=False):
            hit = guess == token
            self._next[grade] += _MEMORY * (hit - self._next[grade])
            if not hit:
                return
