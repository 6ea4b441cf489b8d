"""What leaves the cache first, and which sessions are pinned: rules and queues, no tree.

Nothing here reads a clock. Recency is the tree's logical counter, so that ranks which see the same
operations take the same decisions.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple


class EvictionClass(IntEnum):
    """Why a node may go; lower classes go first."""

    DEAD = 0
    """No live session reaches it any more (closed, rolled back, aborted), nobody used it since."""
    ANONYMOUS = 1
    """Left by requests without a session."""
    IDLE = 2
    """Live sessions run through it, none of them pinned."""
    PINNED = 3
    """A pinned session runs through it: evicted only when nothing else is left."""


class EvictionKey(NamedTuple):
    """Order of eviction: the smallest key goes first."""

    kind: EvictionClass
    cardinality: int
    """A trunk shared by many sessions outlives any one session's tail."""
    recency: float


def eviction_key(*, cardinality: int, pins: int, dead: bool, recency: float) -> EvictionKey:
    """Place a node in the order of eviction.

    Args:
        cardinality: Live sessions whose committed transcript passes through the node.
        pins: How many of those sessions are pinned.
        dead: Whether sessions ran through it once and nobody used it since the last one left.
        recency: Logical time of its last use.
    """
    if pins:
        return EvictionKey(EvictionClass.PINNED, cardinality, recency)
    if cardinality:
        return EvictionKey(EvictionClass.IDLE, cardinality, recency)
    return EvictionKey(EvictionClass.DEAD if dead else EvictionClass.ANONYMOUS, 0, recency)


class EvictionQueue:
    """The nodes that may be evicted, smallest key first, without a scan for each eviction.

    A lazy heap: a key that rose since an item was offered is corrected when the item comes up, and
    an item that stopped being evictable is dropped then. Only a key that *falls* must be offered
    again at once.
    """

    def __init__(self, key_of: Callable[[int], EvictionKey | None]) -> None:
        """``key_of`` gives an item's key now, or None for one that can't be evicted now."""
        self._key_of = key_of
        self._heap: list[tuple[EvictionKey, int]] = []
        self._queued: dict[int, EvictionKey] = {}

    def __len__(self) -> int:
        return len(self._queued)

    def __iter__(self) -> Iterator[int]:
        """The items waiting, in no order."""
        return iter(self._queued)

    def queued_key(self, item: int) -> EvictionKey | None:
        """The key under which an item waits: at most its key now."""
        return self._queued.get(item)

    def offer(self, item: int, key: EvictionKey) -> None:
        """Queue an item, or move it forward if its key fell."""
        known = self._queued.get(item)
        if known is not None and known <= key:
            return
        self._queued[item] = key
        heapq.heappush(self._heap, (key, item))
        if len(self._heap) > 2 * len(self._queued) + 64:
            self._heap = [(queued, each) for each, queued in self._queued.items()]
            heapq.heapify(self._heap)

    def forget(self, item: int) -> None:
        """Drop an item that no longer exists."""
        self._queued.pop(item, None)

    def pop(self) -> int | None:
        """Take out the evictable item with the smallest key; None when there is none."""
        while self._heap:
            key, item = self._heap[0]
            if self._queued.get(item) != key:
                heapq.heappop(self._heap)
                continue
            current = self._key_of(item)
            if current is not None and current > key:
                self._queued[item] = current
                heapq.heapreplace(self._heap, (current, item))
                continue
            heapq.heappop(self._heap)
            del self._queued[item]
            if current is not None:
                return item
        return None

    def clear(self) -> None:
        """Forget every item."""
        self._heap.clear()
        self._queued.clear()


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
