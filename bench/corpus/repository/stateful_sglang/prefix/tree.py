"""The cardinal prefix tree: SGLang's unified radix cache, in which live sessions count.

Selected by ``--radix-cache-backend cardinal`` once :func:`register` ran. Every node knows its
cardinality: how many live sessions' committed transcripts pass through it. A session's leaf moves
when a turn of it finishes well, and only nodes whose count changes are touched. Pins decide the
order of eviction and never lock anything: admission and SGLang's leak check see an ordinary cache.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.unified_cache.components import BASE_COMPONENT_TYPE, ComponentType
from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
    register_tree_core_backend,
    registered_tree_core_backends,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from stateful_sglang.prefix import component
from stateful_sglang.prefix.component import CardinalFullComponent, CardinalNode, CardinalTreeCore
from stateful_sglang.prefix.policy import pin_budget_tokens
from stateful_sglang.runtime.attachments import Attachment

BACKEND = "cardinal"
"""Name under which the tree and its core are registered with SGLang."""

_CACHE = "sglang.srt.mem_cache"
_TREE = f"{_CACHE}.unified_radix_cache.UnifiedRadixCache"
ATTACHMENTS = (
    *component.ATTACHMENTS,
    Attachment(
        f"{_CACHE}.registry.register_radix_cache_backend",
        "registry",
        "the cardinal prefix tree, chosen by --radix-cache-backend cardinal",
    ),
    Attachment(
        f"{_CACHE}.unified_cache.tree_core_registry.register_tree_core_backend",
        "registry",
        "the tree core that reports splits, deletions and new leaves",
    ),
    Attachment(
        f"{_CACHE}.registry.create_unified_radix_cache",
        "subclass",
        "builds our cache class with the model's components",
    ),
    Attachment(
        f"{_CACHE}.cache_init_params.CacheInitParams",
        "subclass",
        "carries our full-attention component and tree core into the cache",
    ),
    Attachment(
        f"{_CACHE}.common.release_kv_cache",
        "subclass",
        "the order insert, free, unlock, on_release is what lets a failed turn insert nothing",
    ),
    Attachment(
        f"{_TREE}.__init__", "subclass", "builds components from the override, then the tree core"
    ),
    Attachment(
        f"{_TREE}.match_prefix", "subclass", "a turn's session ends at the turn's base from here on"
    ),
    Attachment(
        f"{_TREE}.cache_unfinished_req", "subclass", "a recomputed base counts again after prefill"
    ),
    Attachment(
        f"{_TREE}.insert_req",
        "subclass",
        "a turn that ended well moves its session's leaf to where its first insert ended",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.Req.output_ids_through_stop",
        "subclass",
        "where a committed turn's output ends",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.Req._check_vocab_boundary_finish",
        "subclass",
        "NaN logits finish as a matched string, which we don't commit",
    ),
    Attachment(f"{_TREE}.insert", "subclass", "reports the leaf an insert ended on"),
    Attachment(f"{_TREE}.on_release", "subclass", "what a failed turn left in the tree is dead"),
    Attachment(f"{_TREE}.sanity_check", "subclass", "SGLang's own part of the integrity check"),
    Attachment(f"{_TREE}._evict_components", "subclass", "drives our component's eviction walk"),
    Attachment(f"{_TREE}._reset_full", "subclass", "a flush resets the components' session state"),
)


class TreeIntegrityError(AssertionError):
    """The tree's own accounts disagree with a recount."""


class Turn(Protocol):
    """A session's turn in flight, as the scheduler's sessions know it."""

    @property
    def session_id(self) -> str: ...

    @property
    def base_len(self) -> int: ...


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


class CardinalPrefixTree(UnifiedRadixCache):
    """SGLang's unified radix cache with sessions."""

    tree_core: CardinalTreeCore

    def __init__(self, params: CacheInitParams, *, pin_budget: float = 0.5) -> None:
        """Build an empty tree.

        Args:
            params: SGLang's; its component overrides and tree core are replaced by ours.
            pin_budget: Share of the KV pool, 0 to 1, that pinned sessions may claim.
        """
        if BACKEND not in registered_tree_core_backends():
            register_tree_core_backend(BACKEND, CardinalTreeCore)
        overrides = {
            **(params.component_registry_override or {}),
            ComponentType.FULL: CardinalFullComponent,
        }
        super().__init__(
            dataclasses.replace(
                params, component_registry_override=overrides, tree_core_backend=BACKEND
            )
        )
        self._full: CardinalFullComponent = self.components[BASE_COMPONENT_TYPE]
        self._paths = self._full.paths
        self._paths.budget = pin_budget_tokens(
            pin_budget, self.token_to_kv_pool_allocator.size_full
        )
        self._turn_of: Callable[[str], Turn | None] = lambda rid: None
        self._first_insert: tuple[int, int] | None = None

    def bind_sessions(self, turn_of: Callable[[str], Turn | None]) -> None:
        """Tell the tree where to ask for the turn of a request.

        ``turn_of`` must answer until the finished request was released, and with None for requests
        without a session and for those whose session was closed.
        """
        self._turn_of = turn_of

    def release_session_leaf(self, session_id: str) -> None:
        """A session was closed: count it no longer. Its KV stays until eviction needs the room."""
        self._paths.release(session_id)

    def truncate_session(self, session_id: str, length: int) -> None:
        """Move a session's leaf back to ``length`` tokens if it lies beyond; KV stays."""
        leaf = self._paths.leaves.get(session_id)
        end = self._key_length(length)
        if leaf is None or leaf.end <= end:
            return
        node, start = leaf.node, leaf.end - len(leaf.node.key)
        while start >= end and node.parent is not None:
            node = node.parent
            start -= len(node.key)
        if node.parent is None:
            self._paths.move(session_id, None, 0)
        else:
            if start + len(node.key) > end:
                node, actions = self.tree_core.split(node, end - start)
                self._apply_cache_actions(actions)
            self._paths.move(session_id, node, end)
        self._paths.fill_pins()

    # ---- SGLang's side of a request's life ----

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Match as SGLang does; a turn's session ends at the turn's base from here on."""
        if params.req is not None and (turn := self._turn_of(params.req.rid)) is not None:
            self.truncate_session(turn.session_id, turn.base_len)
        return super().match_prefix(params)

    def cache_unfinished_req(self, req: Any, chunked: bool = False, **kwargs: Any) -> None:
        """Cache a prefill as SGLang does; a base that had to be recomputed counts again."""
        super().cache_unfinished_req(req, chunked=chunked, **kwargs)
        if (turn := self._turn_of(req.rid)) is not None and not self.disable:
            self._reclaim_base(req, turn)

    def insert_req(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Insert a finished request; a turn that ended well moves its session's leaf.

        Speculation can compute past the stop: nothing beyond the transcript is inserted. A turn
        that ended badly inserts nothing at all: what its prefill left stays, uncounted.
        """
        turn = self._turn_of(req.rid)
        if turn is None or self.disable:
            super().insert_req(req, up_to=up_to, **kwargs)
            return
        if not ended_well(req):
            for each in self._components_tuple:
                each.cleanup_after_caching_req(req, is_finished=True)
            return
        committed = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        # A hybrid's recurrent state stands for exactly up_to tokens: there only the leaf is cut.
        if len(self._components_tuple) == 1:
            up_to = min(up_to, max(committed, req.kv.cache_protected_len))
        self._first_insert = None
        super().insert_req(req, up_to=up_to, **kwargs)
        if self._first_insert is None:
            return
        leaf_id, end = self._first_insert
        if end:
            self._paths.commit(turn.session_id, self.tree_core.node_by_id(leaf_id), end)
            self.truncate_session(turn.session_id, committed)

    def insert(self, params: InsertParams) -> InsertResult:
        """Insert as SGLang does, noting the leaf: the first insert of a finished request."""
        result = super().insert(params)
        if self._first_insert is None and not result.rotation_tail_declined and not self.disable:
            self._first_insert = (result.last_device_node, len(params.key))
        return result

    def on_release(self, req: Any, *, inserted: bool) -> None:
        """Settle a released request; what a failed turn left in the tree is dead at once."""
        super().on_release(req, inserted=inserted)
        if self._turn_of(req.rid) is None or req.finished_reason is None or ended_well(req):
            return
        node = self.tree_core.find(req.last_node) if req.last_node is not None else None
        while node is not None and node.parent is not None:
            if node.cardinality or len(node.children) > 1 or _locks(node):
                break
            node.died_at = node.last_access_time
            self._full.offer(node)
            node = node.parent

    def _reclaim_base(self, req: Any, turn: Turn) -> None:
        leaf = self._paths.leaves.get(turn.session_id)
        held = leaf.end if leaf else 0
        # The last sampled token's KV is computed with the next turn: a page less is the rule.
        if self._key_length(turn.base_len) - held <= self.page_size:
            return
        if len(req.origin_input_ids) <= turn.base_len:
            return
        key = RadixKey(
            req.origin_input_ids[: turn.base_len],
            req.extra_key,
            is_bigram=self.tree_core.is_eagle,
            cache_salt=req.cache_salt,
        )
        match = self.tree_core.match_prefix(MatchPrefixParams(key=key))
        self._apply_cache_actions(match.cache_actions)
        node = self.tree_core.node_by_id(match.best_match_node)
        end = _depth(node)
        if end > held:
            self._paths.commit(turn.session_id, node, end)

    def _key_length(self, tokens: int) -> int:
        """Length of the tree key that stands for so many tokens."""
        units = max(0, tokens - 1) if self.tree_core.is_eagle else tokens
        return units // self.page_size * self.page_size

    # ---- What can be seen from outside ----

    def summary(self, limit: int) -> dict[str, Any]:
        """Describe the tree, and its ``limit`` nodes with most sessions; never token contents."""
        nodes = self.tree_core.nodes()
        top = heapq.nlargest(limit, nodes, key=lambda n: (n.cardinality, len(n.key), -n.id))
        return {
            "nodes": len(nodes),
            "tokens": sum(len(node.key) for node in nodes),
            "evictable_tokens": self.evictable_size(),
            "protected_tokens": self.protected_size(),
            "sessions": len(self._paths),
            "pinned_sessions": len(self._paths.order),
            "pinned_tokens": self._paths.pinned_tokens,
            "pin_budget_tokens": self._paths.budget,
            "pins_broken": self._full.pins_broken,
            "evicted_tokens": {
                kind.name.lower(): tokens for kind, tokens in self._full.evicted_tokens.items()
            },
            "top": [_info(node, _depth(node))._asdict() for node in top],
        }

    def session_path(self, session_id: str) -> list[NodeInfo]:
        """A session's nodes from the root down; empty if none of its KV is in the tree."""
        leaf = self._paths.leaves.get(session_id)
        depth = leaf.end if leaf else 0
        infos: list[NodeInfo] = []
        for node in self._paths.path(session_id):
            infos.append(_info(node, depth))
            depth -= len(node.key)
        return infos[::-1]

    def check_integrity(self) -> None:
        """Recount everything: sessions, pins, the eviction queue, and SGLang's own accounts.

        Raises:
            TreeIntegrityError: Names every account that is wrong.
            AssertionError: SGLang's own check failed.
        """
        wrong = list(self._paths.violations(self.tree_core.nodes()))
        for node in self.tree_core.evictable_device_leaves:
            queued = self._full.queue.queued_key(node.id)
            if queued is None or queued > node.eviction_key:
                wrong.append(f"node {node.id}: queued as {queued}, but is {node.eviction_key}")
        gone = [node for node in self._full.queue if self.tree_core.find(node) is None]
        if gone:
            wrong.append(f"the eviction queue holds nodes that left the tree: {gone}")
        if wrong:
            raise TreeIntegrityError("the cardinal prefix tree is broken:\n  " + "\n  ".join(wrong))
        self.sanity_check()


def register(pin_budget: float = 0.5) -> None:
    """Register the tree with SGLang under the name :data:`BACKEND`.

    Raises:
        ValueError: ``pin_budget`` lies outside 0 to 1, or the name is taken.
    """
    pin_budget_tokens(pin_budget, 0)
    register_radix_cache_backend(BACKEND, partial(_create, pin_budget=pin_budget))


def _create(ctx: TreeCacheBuildContext, *, pin_budget: float) -> CardinalPrefixTree:
    params = ctx.params
    reason = None
    if ctx.disable_radix_cache:
        reason = "--disable-radix-cache leaves no tree to keep sessions in"
    elif params.enable_session_radix_cache:
        reason = "--enable-session-radix-cache counts sessions in another way"
    elif params.eviction_policy.lower() != "lru":
        reason = f"--radix-eviction-policy {params.eviction_policy} would be ignored"
    elif ctx.is_hybrid_swa and ctx.full_tokens_per_layer == 0:
        reason = "the model has no full-attention layers"
    if reason is not None:
        raise ValueError(
            f"the {BACKEND} prefix tree can't be used: {reason}. "
            "Change that, or start the server with --stateful off."
        )
    return create_unified_radix_cache(
        ctx, cache_class=partial(CardinalPrefixTree, pin_budget=pin_budget)
    )


def ended_well(req: Any) -> bool:
    """Whether a finished request's output becomes part of its session's transcript."""
    reason = req.finished_reason
    if reason is None or isinstance(reason, FINISH_ABORT):
        return False
    # SGLang reports logits that are not numbers as a stop string of this name.
    return getattr(reason, "matched", None) != "NaN happened"


def _locks(node: Any) -> int:
    return node.component_data[BASE_COMPONENT_TYPE].lock_ref


def _depth(node: CardinalNode | None) -> int:
    depth = 0
    while node is not None and node.parent is not None:
        depth += len(node.key)
        node = node.parent
    return depth


def _info(node: Any, depth: int) -> NodeInfo:
    return NodeInfo(node.id, len(node.key), depth, node.cardinality, node.pins > 0, _locks(node))
