"""The prefix tree as a person may see it: counts and places, never contents."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from sglang.srt.mem_cache.unified_cache.components import BASE_COMPONENT_TYPE

from stateful_sglang.runtime.tree.core import CardinalTreeCore

SUMMARY_NODES = 2000
"""Most nodes that one description of the tree looks at: some two milliseconds of Python."""


class NodeInfo(NamedTuple):
    """One tree node, without its contents."""

    id: int
    tokens: int
    depth: int
    """Tokens from the root to the node's end."""
    cardinality: int
    pinned: bool
    locks: int
    """Running requests that hold the node's KV."""


def locks(node: Any) -> int:
    """Running requests that hold the node's KV."""
    count: int = node.component_data[BASE_COMPONENT_TYPE].lock_ref
    return count


def upwards(nodes: Iterable[Any], depth: int, limit: int) -> list[NodeInfo]:
    """The last ``limit`` nodes of a path, from above down; ``nodes`` go up from its end."""
    infos: list[NodeInfo] = []
    for node in islice(nodes, limit):
        infos.append(_info(node, depth))
        depth -= len(node.key)
    return infos[::-1]


def top(core: CardinalTreeCore, limit: int) -> tuple[list[NodeInfo], bool]:
    """The nodes with most sessions, and whether the search was cut short.

    A node has at most its parent's sessions, so that the best nodes are found from the root down,
    best first.
    """
    best: list[NodeInfo] = []
    seen = 0
    frontier: list[tuple[int, int, int, int, Any]] = []

    def look_at(parent: Any, depth: int) -> None:
        nonlocal seen
        for node in islice(parent.children.values(), SUMMARY_NODES - seen):
            seen += 1
            tokens = len(node.key)
            heapq.heappush(frontier, (-node.cardinality, -tokens, node.id, depth + tokens, node))

    look_at(core.root_node, 0)
    while frontier and len(best) < limit:
        *_, depth, node = heapq.heappop(frontier)
        best.append(_info(node, depth))
        look_at(node, depth)
    return best, seen >= SUMMARY_NODES and core.node_count > seen


def _info(node: Any, depth: int) -> NodeInfo:
    return NodeInfo(node.id, len(node.key), depth, node.cardinality, node.pins > 0, locks(node))
