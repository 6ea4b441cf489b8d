"""SGLang's Python tree core and full-attention component, taught to count sessions.

The core reports every split, deletion and new leaf; the component evicts in our order. Components
for sliding windows and Mamba stay SGLang's own: they evict what only they hold in their own order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.cache_action import CacheAction, ComponentAction
from sglang.srt.mem_cache.unified_cache.components import (
    ComponentType,
    EvictLayer,
    FullComponent,
    TreeComponent,
)
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore, UnifiedTreeNode

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.prefix.paths import SessionPaths
from stateful_sglang.prefix.policies.base import EvictionClass, EvictionPolicy, NodeFacts
from stateful_sglang.prefix.queue import EvictionKey, EvictionQueue

logger = logging.getLogger(__name__)

_CACHE = "sglang.srt.mem_cache.unified_cache"
_CORE = f"{_CACHE}.unified_tree_core.UnifiedTreeCore"
_FULL = f"{_CACHE}.components.full.FullComponent"
ATTACHMENTS = (
    Attachment(f"{_CORE}.reset", "relies", "the node arena and the set of evictable leaves"),
    Attachment(f"{_CORE}._new_node", "subclass", "nodes carry cardinality and pins"),
    Attachment(
        f"{_CORE}._split_node", "subclass", "both parts keep the counts and the time of last use"
    ),
    Attachment(
        f"{_CORE}._update_evictable_leaf_sets",
        "subclass",
        "the one place that makes a node evictable: it enters the eviction queue there",
    ),
    Attachment(
        f"{_CORE}._remove_leaf_from_parent",
        "subclass",
        "the one place that deletes a node: its sessions end above it",
    ),
    Attachment(f"{_CORE}._match_post_processor", "relies", "recency rises along a matched path"),
    Attachment(f"{_CORE}._insert_walk_step", "relies", "recency rises along an inserted path"),
    Attachment(
        f"{_CORE}._touch_node", "relies", "what a use of a node is: the time of its last access"
    ),
    Attachment(f"{_CORE}.evict_device_leaf", "relies", "deletes or demotes the node we selected"),
    Attachment(f"{_FULL}.evict_component", "subclass", "counts evicted tokens by class"),
    Attachment(f"{_FULL}._evict_device_start", "subclass", "replaced: no scan of all leaves"),
    Attachment(f"{_FULL}._evict_device_next_node", "subclass", "replaced: our order of eviction"),
    Attachment(
        f"{_FULL}._evict_device_end", "subclass", "replaced: what was not evicted is queued again"
    ),
    Attachment(
        f"{_FULL}.release_component_lock", "relies", "an unlocked leaf becomes evictable again"
    ),
    Attachment(
        f"{_CACHE}.components.base.TreeComponent.reset_session_state",
        "subclass",
        "called on start and flush: paths and queue start anew",
    ),
    Attachment(
        "sglang.srt.mem_cache.radix_cache.RadixKey",
        "relies",
        "keys of nodes: their length, their slices, salt and extra key",
    ),
    Attachment(
        "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeNode",
        "subclass",
        "nodes carry cardinality, pins and depth",
    ),
)

_NEVER = -1.0


class CardinalNode(UnifiedTreeNode):
    """A tree node that knows the live sessions which run through it (see ``PathNode``)."""

    parent: CardinalNode | None

    def __init__(self, tree_components: tuple[ComponentType, ...], priority: int = 0) -> None:
        super().__init__(tree_components, priority=priority)
        self.cardinality = 0
        self.pins = 0
        self.leaf_of: dict[str, None] = {}
        self.died_at = _NEVER
        self._depth: int | None = None

    @property
    def depth(self) -> int:
        """Tokens from the root to the node's end; a node keeps it for life, whatever is split."""
        unknown: list[CardinalNode] = []
        node = self
        while node._depth is None and node.parent is not None:
            unknown.append(node)
            node = node.parent
        depth = node._depth or 0
        for node in reversed(unknown):
            depth += len(node.key)
            node._depth = depth
        return depth

    @property
    def has_died(self) -> bool:
        """Whether it was dead once; who used it since may have brought it back."""
        return self.died_at != _NEVER

    @property
    def is_dead(self) -> bool:
        """Whether no session has it, and nobody used it since it died."""
        return not self.cardinality and self.died_at >= self.last_access_time

    @property
    def facts(self) -> NodeFacts:
        """What the order of eviction may depend on, as it is now."""
        return NodeFacts(
            cardinality=self.cardinality,
            pins=self.pins,
            dead=self.died_at >= self.last_access_time,
            recency=float(self.last_access_time),
            tokens=len(self.key),
            depth=self.depth,
        )


class CardinalFullComponent(FullComponent):
    """Full-attention KV, evicted in the order of a policy.

    Owns the sessions' paths and the queue of evictable nodes.
    """

    def __init__(self, cache: Any, params: CacheInitParams, policy: EvictionPolicy) -> None:
        super().__init__(cache, params)
        self._policy = policy
        self.paths = SessionPaths(on_cheaper=self.offer)
        self.queue = EvictionQueue(self._evictable_key)
        self.evicted_tokens = dict.fromkeys(EvictionClass, 0)
        self.pins_broken = 0
        self._wanted_tokens = 0
        self._selected: list[CardinalNode] = []

    def reset_session_state(self) -> None:
        """The tree was emptied (start, flush, new weights): sessions go on without KV."""
        super().reset_session_state()
        self.paths.clear()
        self.queue.clear()
        self._selected.clear()

    def offer(self, node: Any) -> None:
        """Queue a node for eviction if it can be evicted now."""
        if node in self.tree_core.evictable_device_leaves:
            self.queue.offer(node.id, self.eviction_key(node))

    def eviction_key(self, node: CardinalNode) -> EvictionKey:
        """Where a node stands in the order of eviction now."""
        return self._policy.key(node.facts)

    def evict_component(
        self,
        node: CardinalNode,
        device_frees: dict[ComponentType, list[torch.Tensor]],
        host_frees: dict[ComponentType, list[torch.Tensor]],
        cache_actions: list[CacheAction | ComponentAction],
        target: EvictLayer = EvictLayer.DEVICE,
    ) -> tuple[int, int]:
        """Free the node's KV and count what kind of node was lost. Returns tokens freed
        (device, host)."""
        freed, host_freed = super().evict_component(
            node, device_frees, host_frees, cache_actions, target
        )
        if freed:
            kind = node.facts.kind
            self.evicted_tokens[kind] += freed
            if kind is EvictionClass.PINNED:
                if not self.pins_broken:
                    logger.warning(
                        "The KV pool is too small for what runs: pinned sessions lose KV and will "
                        "recompute it. Lower --pin-budget, run fewer sessions or enlarge the pool."
                    )
                self.pins_broken += 1
        return freed, host_freed

    def _evictable_key(self, node_id: int) -> EvictionKey | None:
        node = self.tree_core.find(node_id)
        evictable = node is not None and node in self.tree_core.evictable_device_leaves
        return self.eviction_key(node) if evictable else None

    def _evict_device_start(self, request_cnt: int) -> None:
        self._wanted_tokens = request_cnt

    def _evict_device_next_node(
        self,
        tracker: dict[ComponentType, int],
        device_frees: dict[ComponentType, list[torch.Tensor]],
        host_frees: dict[ComponentType, list[torch.Tensor]],
        cache_actions: list[CacheAction | ComponentAction],
    ) -> int | None:
        if tracker[self.component_type] >= self._wanted_tokens:
            return None
        node_id = self.queue.pop()
        if node_id is None:
            return None
        self._selected.append(self.tree_core.node_by_id(node_id))
        return node_id

    def _evict_device_end(self) -> None:
        # A node whose backup to the host failed is still there: not again in this walk, but later.
        for node in self._selected:
            self.offer(node)
        self._selected.clear()


class CardinalTreeCore(UnifiedTreeCore):
    """The Python tree core; the Rust one accepts no components but SGLang's own."""

    def __init__(
        self, params: CacheInitParams, components: dict[ComponentType, TreeComponent]
    ) -> None:
        full = components.get(ComponentType.FULL)
        if not isinstance(full, CardinalFullComponent):
            raise ValueError(
                f"the cardinal tree core needs a CardinalFullComponent, got {type(full).__name__}; "
                "select it by --radix-cache-backend cardinal"
            )
        self._full = full
        super().__init__(params, components)

    def find(self, node_id: int) -> CardinalNode | None:
        """The node of that id, or None if it left the tree."""
        return self._node_arena.get(node_id)

    @property
    def node_count(self) -> int:
        """Nodes in the tree, the root not counted."""
        return len(self._node_arena) - 1

    def nodes(self) -> Sequence[CardinalNode]:
        """Every node but the root."""
        return [node for node in self._node_arena.values() if node.parent is not None]

    def split(self, node: CardinalNode, length: int) -> tuple[CardinalNode, list[CacheAction]]:
        """Cut a node after ``length`` of its tokens; the front part and what the cache must do."""
        front, action = self._split_node(node.key, node, length)
        return front, [] if action is None else [action]

    def _new_node(self, priority: int = 0) -> CardinalNode:
        node = CardinalNode(self.component_types, priority=priority)
        self._register_node(node)
        return node

    def _split_node(
        self, key: RadixKey, child: CardinalNode, split_len: int
    ) -> tuple[CardinalNode, CacheAction | ComponentAction | None]:
        last_used = child.last_access_time
        front, action = super()._split_node(key, child, split_len)
        # SGLang calls a split a use of both parts; here an unused tail must stay old (and dead).
        front.last_access_time = child.last_access_time = last_used
        self._full.paths.split(front, child)
        self._full.offer(child)
        return front, action

    def _update_evictable_leaf_sets(self, node: CardinalNode) -> None:
        super()._update_evictable_leaf_sets(node)
        self._full.offer(node)

    def _remove_leaf_from_parent(self, node: CardinalNode) -> None:
        super()._remove_leaf_from_parent(node)
        self._full.paths.delete(node)
        self._full.queue.forget(node.id)
