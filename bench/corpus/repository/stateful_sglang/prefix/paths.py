"""The paths of live sessions in the tree: the one writer of cardinality, pins and leaf marks.

Works on any node that has the attributes of :class:`PathNode`; knows neither SGLang nor KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Protocol

from stateful_sglang.prefix.policy import PinOrder


class PathNode(Protocol):
    """A tree node as this module sees it; the root has no parent and is never counted."""

    id: int
    key: Sized | None
    last_access_time: float
    cardinality: int
    """Live sessions whose committed transcript passes through the whole node."""
    pins: int
    """How many of those sessions are pinned."""
    leaf_of: dict[str, None]
    """Sessions whose path ends here; a dict, because its order is the same on every rank."""
    died_at: float
    """``last_access_time`` when the last session left; a later use makes the node anonymous."""

    @property
    def parent(self) -> PathNode | None: ...


@dataclass(slots=True)
class SessionLeaf:
    """Where a session's path ends."""

    node: PathNode
    end: int
    """Tokens from the root to the node's end; never more than the session's transcript."""


class SessionPaths:
    """Where each live session's path ends, and what that makes of the nodes above."""

    def __init__(self, on_cheaper: Callable[[PathNode], None]) -> None:
        """``on_cheaper`` is told each node that may now be evicted earlier than before."""
        self.budget = 0
        """Most tokens that pinned paths may cover, a shared node counted once."""
        self.pinned_tokens = 0
        self.order = PinOrder()
        self._leaves: dict[str, SessionLeaf] = {}
        self._on_cheaper = on_cheaper

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def leaves(self) -> Mapping[str, SessionLeaf]:
        """Leaf of each session that has KV in the tree; read only."""
        return self._leaves

    def commit(self, session_id: str, node: PathNode, end: int) -> None:
        """Move a session's leaf, make it the most recently used session, and pin it if it fits."""
        self.move(session_id, node, end)
        if end > self.budget:
            self._unpin(session_id)
            self.order.drop(session_id)
            return
        if session_id not in self.order:
            self._pin(session_id)
        self.order.pin(session_id)
        while self.pinned_tokens > self.budget:
            self._unpin_path(self.order.demote_coldest())

    def move(self, session_id: str, node: PathNode | None, end: int) -> None:
        """Move a session's leaf to the node that ends at ``end`` tokens (None and 0: the root).

        Touches only the nodes between the two leaves and their lowest common ancestor, so that a
        session that branched off is counted once on the trunk.
        """
        leaf = self._leaves.get(session_id)
        pinned = session_id in self.order
        old, old_end = (leaf.node, leaf.end) if leaf else (None, 0)
        if old is not None:
            del old.leaf_of[session_id]
        new, new_end = node, end
        while new is not old:
            if new is not None and new_end >= old_end:
                self._enter(new, pinned)
                new_end -= _tokens(new)
                new = _above(new)
            else:
                assert old is not None, "leaf depths disagree with the tree"
                self._leave(old, pinned)
                old_end -= _tokens(old)
                old = _above(old)
        if node is None:
            self._leaves.pop(session_id, None)
            self.order.drop(session_id)
            return
        node.leaf_of[session_id] = None
        self._leaves[session_id] = SessionLeaf(node, end)

    def release(self, session_id: str) -> None:
        """End a session: its path is no longer counted, and its pin goes to who waits for one."""
        self.move(session_id, None, 0)
        self.fill_pins()

    def fill_pins(self) -> None:
        """Pin the most recently used waiting sessions as long as they fit."""
        while (waiting := self.order.next_waiting()) is not None:
            added = sum(_tokens(node) for node in self.path(waiting) if not node.pins)
            if self.pinned_tokens + added > self.budget:
                return
            self._pin(waiting)
            self.order.promote(waiting)

    def path(self, session_id: str) -> Iterator[PathNode]:
        """A session's nodes from its leaf up, the root left out."""
        leaf = self._leaves.get(session_id)
        node = leaf.node if leaf else None
        while node is not None:
            yield node
            node = _above(node)

    def split(self, parent: PathNode, child: PathNode) -> None:
        """``parent`` was split off the front of ``child``: all who pass the one pass the other."""
        parent.cardinality = child.cardinality
        parent.pins = child.pins
        parent.died_at = child.died_at

    def delete(self, node: PathNode) -> None:
        """A childless node leaves the tree: sessions that ended there now end above it."""
        above = _above(node)
        for session_id in node.leaf_of:
            leaf = self._leaves[session_id]
            leaf.end -= _tokens(node)
            if above is None:
                del self._leaves[session_id]
                self.order.drop(session_id)
            else:
                leaf.node = above
                above.leaf_of[session_id] = None
        if node.pins:
            self.pinned_tokens -= _tokens(node)

    def clear(self) -> None:
        """The tree was emptied: no session has KV any more."""
        self._leaves.clear()
        self.order.clear()
        self.pinned_tokens = 0

    def violations(self, nodes: Iterable[PathNode]) -> Iterator[str]:
        """Recount everything from the leaves; one line for each fact that doesn't hold."""
        counts: dict[int, int] = {}
        pins: dict[int, int] = {}
        for session_id, leaf in self._leaves.items():
            depth = 0
            for node in self.path(session_id):
                depth += _tokens(node)
                counts[node.id] = counts.get(node.id, 0) + 1
                pins[node.id] = pins.get(node.id, 0) + (session_id in self.order)
            if depth != leaf.end:
                yield f"session {session_id}: leaf at {leaf.end} tokens, its path has {depth}"
            if session_id not in leaf.node.leaf_of:
                yield f"session {session_id}: leaf node {leaf.node.id} does not name it"
        pinned = marks = 0
        for node in nodes:
            if node.cardinality != counts.pop(node.id, 0):
                yield f"node {node.id}: cardinality {node.cardinality} is not what its leaves say"
            if node.pins != pins.get(node.id, 0):
                yield f"node {node.id}: {node.pins} pins, expected {pins.get(node.id, 0)}"
            pinned += _tokens(node) if node.pins else 0
            marks += len(node.leaf_of)
        if counts:
            yield f"sessions run through nodes outside the tree: {sorted(counts)}"
        if marks != len(self._leaves):
            yield f"{marks} leaf marks for {len(self._leaves)} sessions"
        if pinned != self.pinned_tokens:
            yield f"pinned tokens {self.pinned_tokens}, recounted {pinned}"
        if pinned > self.budget:
            yield f"pinned tokens {pinned} exceed the budget {self.budget}"

    def _enter(self, node: PathNode, pinned: bool) -> None:
        node.cardinality += 1
        if pinned:
            self._pin_node(node)

    def _leave(self, node: PathNode, pinned: bool) -> None:
        node.cardinality -= 1
        if not node.cardinality:
            node.died_at = node.last_access_time
        if pinned:
            self._unpin_node(node)
        self._on_cheaper(node)

    def _pin(self, session_id: str) -> None:
        for node in self.path(session_id):
            self._pin_node(node)

    def _unpin(self, session_id: str) -> None:
        if session_id in self.order:
            self._unpin_path(session_id)

    def _unpin_path(self, session_id: str) -> None:
        for node in self.path(session_id):
            self._unpin_node(node)
            self._on_cheaper(node)

    def _pin_node(self, node: PathNode) -> None:
        if not node.pins:
            self.pinned_tokens += _tokens(node)
        node.pins += 1

    def _unpin_node(self, node: PathNode) -> None:
        node.pins -= 1
        if not node.pins:
            self.pinned_tokens -= _tokens(node)


def _above(node: PathNode) -> PathNode | None:
    """The node above, or None where that is the root."""
    parent = node.parent
    return None if parent is None or parent.parent is None else parent


def _tokens(node: PathNode) -> int:
    assert node.key is not None
    return len(node.key)
