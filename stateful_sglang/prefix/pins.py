"""Which sessions are pinned, and how much of the KV pool that may take: no tree, no clock."""

from __future__ import annotations

from collections import OrderedDict


class PinOrder:
    """Which sessions hold a pin: always more recently used ones than those that wait for one."""

    def __init__(self) -> None:
        # Both from the least to the most recently used.
        self._pinned: OrderedDict[str, None] = OrderedDict()
        self._waiting: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._pinned

    def __len__(self) -> int:
        return len(self._pinned)

    def pin(self, session_id: str) -> None:
        """Pin a session as the most recently used one."""
        self._waiting.pop(session_id, None)
        self._pinned[session_id] = None
        self._pinned.move_to_end(session_id)

    def demote_coldest(self) -> str:
        """Take the pin of the least recently used pinned session, which now waits first in line.

        Raises:
            KeyError: Nothing is pinned.
        """
        session_id, _ = self._pinned.popitem(last=False)
        self._waiting[session_id] = None
        return session_id

    def next_waiting(self) -> str | None:
        """The most recently used session that waits for a pin."""
        return next(reversed(self._waiting), None)

    def promote(self, session_id: str) -> None:
        """Pin a waiting session as the least recently used of the pinned ones."""
        del self._waiting[session_id]
        self._pinned[session_id] = None
        self._pinned.move_to_end(session_id, last=False)

    def drop(self, session_id: str) -> None:
        """Forget a session, pinned or waiting or neither."""
        self._pinned.pop(session_id, None)
        self._waiting.pop(session_id, None)

    def clear(self) -> None:
        """Forget every session."""
        self._pinned.clear()
        self._waiting.clear()


def pin_budget_tokens(fraction: float, pool_tokens: int) -> int:
    """Tokens of the KV pool that pins may claim.

    Raises:
        ValueError: ``fraction`` lies outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"the pin budget is {fraction}; expected a share of the KV pool between 0 and 1"
        )
    return int(fraction * pool_tokens)
