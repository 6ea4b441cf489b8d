"""What an eviction policy is told of a node, and what it answers: a place in the order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import ClassVar, NamedTuple

from stateful_sglang.prefix.queue import EvictionKey


class EvictionClass(IntEnum):
    """Who still needs a node, from nobody to a pinned session; evicted tokens are counted by it."""

    DEAD = 0
    """No live session reaches it any more (closed, rolled back, aborted), nobody used it since."""
    ANONYMOUS = 1
    """Left by requests without a session."""
    IDLE = 2
    """Live sessions run through it, none of them pinned."""
    PINNED = 3
    """A pinned session runs through it."""


class NodeFacts(NamedTuple):
    """A tree node as a policy sees it, at one moment."""

    cardinality: int
    """Live sessions whose committed transcript passes through the node."""
    pins: int
    """How many of those sessions are pinned."""
    dead: bool
    """Whether sessions ran through it once and nobody used it since the last one left."""
    recency: float
    """Logical time of its last use."""
    tokens: int
    """What evicting it frees."""
    depth: int
    """Tokens from the root to the node's end: what its last token attends to."""

    @property
    def kind(self) -> EvictionClass:
        """The same for every policy."""
        if self.pins:
            return EvictionClass.PINNED
        if self.cardinality:
            return EvictionClass.IDLE
        return EvictionClass.DEAD if self.dead else EvictionClass.ANONYMOUS


class EvictionPolicy(ABC):
    """An order of eviction.

    A policy reads no clock and asks the tree for nothing, so that ranks which see the same
    operations take the same decisions; recency is the tree's logical counter.

    The queue looks at a key again when its node comes up, and when the tree offers the node: it
    does so when the node becomes a leaf that can be evicted, loses a session or a pin, dies, or is
    cut. A key may *fall* at those moments only. It may rise whenever it likes. What would make a
    node cheaper as time passes belongs into its key beforehand: when a claim ends, not whether it
    has ended.
    """

    keeps_pins: ClassVar[bool]
    """Whether pinned paths go last. Where they don't, no session is pinned at all."""

    @abstractmethod
    def key(self, node: NodeFacts) -> EvictionKey:
        """Where a node stands in the order now. Changes nothing, neither the node nor the policy.

        Keys of one policy are all of one form: they are compared with each other.
        """
