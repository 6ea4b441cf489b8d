"""The nodes that may be evicted, in order, whatever the order is."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

EvictionKey = tuple[float, ...]
"""Order of eviction: the smallest key goes first. Only compared, never looked into."""


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
