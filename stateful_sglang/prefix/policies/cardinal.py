"""Who still needs a node decides."""

from __future__ import annotations

from typing import ClassVar

from stateful_sglang.prefix.policies.base import EvictionPolicy, NodeFacts
from stateful_sglang.prefix.queue import EvictionKey


class Cardinal(EvictionPolicy):
    """Dead tails first, then what plain requests left, then live sessions, pinned ones last.

    Among live sessions a trunk shared by many outlives any one session's tail.
    """

    keeps_pins: ClassVar[bool] = True

    def key(self, node: NodeFacts) -> EvictionKey:
        """Class, cardinality, recency."""
        return (node.kind, node.cardinality, node.recency)
