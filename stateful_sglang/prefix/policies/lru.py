"""Time of last use decides: what stock caches do, to compare with."""

from __future__ import annotations

from typing import ClassVar

from stateful_sglang.prefix.policies.base import EvictionPolicy, NodeFacts
from stateful_sglang.prefix.queue import EvictionKey


class Lru(EvictionPolicy):
    """The least recently used node first, whoever needs it."""

    keeps_pins: ClassVar[bool] = False

    def key(self, node: NodeFacts) -> EvictionKey:
        """Recency alone."""
        return (node.recency,)
