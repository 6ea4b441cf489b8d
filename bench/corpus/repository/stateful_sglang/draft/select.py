"""How many tokens of a looked-up continuation to draft.

A draft of `k` tokens is worth its place when the tokens it is expected to add outweigh what
verifying them costs. The expectation is learnt for each transcript from how continuations of
matches of a given length fared; the cost belongs to the device.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class VerifyCost(NamedTuple):
    """Time of a verify step, in plain decode steps: `1 + fixed + per_token * drafted`."""

    fixed: float
    per_token: float


CPU_COST = VerifyCost(fixed=0.10, per_token=0.03)
"""Weights dominate a CPU step and are read once for all rows: verifying 8 rows of the embedded
model took 1.2 to 1.4 plain steps on 2 cores."""

GPU_COST = VerifyCost(fixed=0.25, per_token=0.002)
"""Rows are nearly free; leaving the captured decode graph is what costs."""

# Match lengths that share one record: 1, 2, 3-4, 5-8, 9 and more.
_BOUNDS = (2, 3, 5, 9)
# What a match of such a length is worth before anything was seen: the chance that the first token
# holds, and that each further one holds after its predecessor did.
_PRIOR_FIRST = (0.30, 0.45, 0.60, 0.75, 0.90)
_PRIOR_NEXT = (0.60, 0.70, 0.80, 0.85, 0.93)
_MEMORY = 0.12
"""Weight of the newest observation: some eight rejections silence a kind of match, and, since plain
steps are scored as well, as few hits bring it back."""


class WidthPolicy:
    """Chooses draft widths for one transcript; adapts to how its drafts fare."""

    __slots__ = ("_cost", "_first", "_max_draft", "_next")

    def __init__(self, max_draft: int, cost: VerifyCost) -> None:
        if max_draft < 0:
            raise ValueError(f"max_draft is {max_draft}: expected 0 (never draft) or more")
        self._max_draft = max_draft
        self._cost = cost
        self._first = list(_PRIOR_FIRST)
        self._next = list(_PRIOR_NEXT)

    def width(self, match_length: int, room: int) -> int:
        """Tokens to draft after a match of `match_length` tokens, at most `room`.

        0 is a normal answer: there is no match, or no width is expected to pay.
        """
        if match_length <= 0:
            return 0
        kind = bisect_right(_BOUNDS, match_length)
        chance, keep = self._first[kind], self._next[kind]
        cost = 1.0 + self._cost.fixed
        tokens, best, width = 1.0, 1.0, 0
        for k in range(1, min(self._max_draft, room) + 1):
            tokens += chance
            cost += self._cost.per_token
            chance *= keep
            if tokens > best * cost:
                best, width = tokens / cost, k
        return width

    def observe(self, match_length: int, offered: list[int], emitted: list[int]) -> None:
        """Score a looked-up continuation against the tokens that were generated.

        `offered` may be longer than what was drafted, and nothing need have been drafted at all:
        what a plain step generated tells as much about the first token.
        """
        if match_length <= 0 or not offered or not emitted:
            return
        kind = bisect_right(_BOUNDS, match_length)
        hit = offered[0] == emitted[0]
        self._first[kind] += _MEMORY * (hit - self._first[kind])
        if not hit:
            return
        for guess, token in zip(offered[1:], emitted[1:], strict=False):
            hit = guess == token
            self._next[kind] += _MEMORY * (hit - self._next[kind])
            if not hit:
                return
