"""The cardinal prefix tree: SGLang's unified radix cache, in which live sessions count.

Selected by ``--radix-cache-backend cardinal`` once :func:`register` ran. Every node knows its
cardinality: how many live sessions' committed transcripts pass through it. A session's leaf moves
when a turn of it finishes well, and only nodes whose count changes are touched. Pins decide the
order of eviction and never lock anything: admission and SGLang's leak check see an ordinary cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.prefix import policies
from stateful_sglang.prefix.pins import pin_budget_tokens
from stateful_sglang.runtime.tree import core as component
from stateful_sglang.runtime.tree import describe, ends, publishing
from stateful_sglang.runtime.tree.core import CardinalFullComponent, CardinalTreeCore
from stateful_sglang.runtime.tree.describe import SUMMARY_NODES, NodeInfo
from stateful_sglang.runtime.tree.ends import ended_well
from stateful_sglang.runtime.tree.leaves import Leaves, Turn
from stateful_sglang.runtime.tree.publishing import Publishing

BACKEND = "cardinal"
"""Name under which the tree and its core are registered with SGLang."""

_CACHE = "sglang.srt.mem_cache"
_TREE = f"{_CACHE}.unified_radix_cache.UnifiedRadixCache"
_REQ = "sglang.srt.managers.schedule_batch.Req"
ATTACHMENTS = (
    *component.ATTACHMENTS,
    *ends.ATTACHMENTS,
    *publishing.ATTACHMENTS,
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
        "relies",
        "builds our cache class with the model's components",
    ),
    Attachment(
        f"{_CACHE}.cache_init_params.CacheInitParams",
        "relies",
        "carries our full-attention component and tree core into the cache",
    ),
    Attachment(
        f"{_CACHE}.common.release_kv_cache",
        "relies",
        "the order checkpoint, free, unlock, on_release lets a failed turn leave nothing",
    ),
    Attachment(
        f"{_TREE}.__init__", "subclass", "builds components from the override, then the tree core"
    ),
    Attachment(
        f"{_TREE}.match_prefix", "subclass", "a turn's session ends at the turn's base from here on"
    ),
    Attachment(
        f"{_TREE}.checkpoint_into_tree",
        "subclass",
        "a recomputed base counts again after prefill; a turn that ended well moves its session's "
        "leaf to the node that the request's lock moved to; one that failed is not inserted",
    ),
    Attachment(f"{_TREE}.on_release", "subclass", "what a failed turn left in the tree is dead"),
    Attachment(
        f"{_TREE}.checkpoint",
        "relies",
        "only a streaming session of SGLang's own comes between it and checkpoint_into_tree",
    ),
    Attachment(
        f"{_TREE}._match_tree", "relies", "a match moves no lock and applies its own cache actions"
    ),
    Attachment(
        f"{_TREE}.touch_prefix",
        "subclass",
        "waiting requests are matched past match_prefix: recency rises, no session's leaf moves",
    ),
    Attachment(
        f"{_TREE}.insert",
        "subclass",
        "every key that comes into the tree: a node ends where its published part does",
    ),
    Attachment(
        "sglang.srt.managers.schedule_policy.SchedulePolicy._touch_waiting_prefixes",
        "relies",
        "when waiting requests are matched that way",
    ),
    Attachment(
        f"{_TREE}._apply_cache_actions",
        "relies",
        "what a split or a match of the tree core asks of the cache is done at once",
    ),
    Attachment(
        f"{_CACHE}.common.checkpoint_kv_cache",
        "relies",
        "a running request is checkpointed after each chunk and at the end of its prefill",
    ),
    Attachment(
        f"{_REQ}.owned_kv_len",
        "relies",
        "nothing beyond the stop is inserted, though speculation may have computed it",
    ),
    Attachment(
        f"{_REQ}.output_ids_through_stop",
        "relies",
        "where a committed turn's output ends",
    ),
    Attachment(f"{_TREE}.sanity_check", "relies", "SGLang's own part of the integrity check"),
    Attachment(f"{_TREE}._evict_components", "relies", "drives our component's eviction walk"),
    Attachment(f"{_TREE}._reset_full", "relies", "a flush resets the components' session state"),
    Attachment(
        "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
        "relies",
        "what a match is asked with",
    ),
    Attachment(
        "sglang.srt.mem_cache.base_prefix_cache.MatchResult",
        "relies",
        "what a match answers",
    ),
    Attachment(
        "sglang.srt.mem_cache.registry.TreeCacheBuildContext",
        "relies",
        "what our tree is built from",
    ),
    Attachment(
        "sglang.srt.mem_cache.unified_cache.tree_core_registry.registered_tree_core_backends",
        "registry",
        "our tree core is registered once a process",
    ),
)


class TreeIntegrityError(AssertionError):
    """The tree's own accounts disagree with a recount."""


class CardinalPrefixTree(UnifiedRadixCache):
    """SGLang's unified radix cache with sessions."""

    tree_core: CardinalTreeCore

    def __init__(
        self,
        params: CacheInitParams,
        *,
        pin_budget: float = 0.5,
        eviction_policy: str = policies.DEFAULT,
        publish_budget: float = 0.1,
    ) -> None:
        """Build an empty tree.

        Args:
            params: SGLang's; its component overrides and tree core are replaced by ours.
            pin_budget: Share of the KV pool, 0 to 1, that pinned sessions may claim.
            eviction_policy: Name of the order in which nodes are evicted.
            publish_budget: Share of the KV pool, 0 to 1, that published prefixes may have.

        Raises:
            ValueError: ``pin_budget`` lies outside 0 to 1, or there is no such policy.
        """
        policy = policies.POLICIES.load(eviction_policy)()
        if BACKEND not in registered_tree_core_backends():
            register_tree_core_backend(BACKEND, CardinalTreeCore)
        overrides = {
            **(params.component_registry_override or {}),
            ComponentType.FULL: partial(CardinalFullComponent, policy=policy),
        }
        super().__init__(
            dataclasses.replace(
                params, component_registry_override=overrides, tree_core_backend=BACKEND
            )
        )
        self._full: CardinalFullComponent = self.components[BASE_COMPONENT_TYPE]
        self._paths = self._full.paths
        budget = pin_budget_tokens(pin_budget, self.token_to_kv_pool_allocator.size_full)
        self._paths.budget = budget if policy.keeps_pins else 0
        self._eviction_policy = eviction_policy
        self._leaves = Leaves(self.tree_core, self._full, self.page_size, self._apply_cache_actions)
        self._publishing = Publishing(
            self.tree_core,
            self._leaves.key_length,
            self._apply_cache_actions,
            int(publish_budget * self.token_to_kv_pool_allocator.size_full),
        )
        self._turn_of: Callable[[str], Turn | None] = lambda rid: None

    def bind_sessions(self, turn_of: Callable[[str], Turn | None]) -> None:
        """Tell the tree where to ask for the turn of a request.

        ``turn_of`` must answer until the finished request was released, and with None for requests
        without a session.
        """
        self._turn_of = turn_of

    def release_session_leaf(self, session_id: str) -> None:
        """A session was closed: count it no longer. Its KV stays until eviction needs the room."""
        self._paths.release(session_id)

    def truncate_session(self, session_id: str, length: int) -> None:
        """Move a session's leaf back to ``length`` tokens if it lies beyond; the tail is dead."""
        self._leaves.truncate(session_id, length)

    def fork_session(self, source_id: str, session_id: str, length: int) -> None:
        """Let a new session share the KV of another's first ``length`` tokens, as far as it's
        there. Nothing is computed or copied."""
        self._leaves.fork(source_id, session_id, length)

    def bury_turn(self, req: Any) -> None:
        """A turn ended badly, whatever SGLang said of it at its release: what it left is dead."""
        self._leaves.bury(req)

    def publish(self, prefix_id: str, tokens: Sequence[int]) -> tuple[int, str | None]:
        """Let requests of all salts share the KV of these tokens from their next match on.

        Returns:
            How many of them are shared, whole pages, and why they can't be published.
        """
        return self._publishing.add(prefix_id, tokens)

    def unpublish(self, prefix_id: str) -> None:
        """Publish these tokens no longer; their KV stays until eviction needs the room."""
        self._publishing.remove(prefix_id)

    # ---- SGLang's side of a request's life ----

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Match as SGLang does; a turn's session ends at the turn's base from here on."""
        if params.req is not None and self._publishing.active and not self.disable:
            key = self._publishing.key_of(params.req, params.key)
            params = dataclasses.replace(params, key=key)
        turn = self._turn_of(params.req.rid) if params.req is not None else None
        if turn is None:
            return super().match_prefix(params)
        if turn.kind != "ephemeral":
            self._leaves.truncate(turn.session_id, turn.base_len)
        result = super().match_prefix(params)
        self._leaves.note_found(params.req, result.device_prefix_len)
        return result

    def touch_prefix(self, key: RadixKey) -> None:
        """Count KV that a waiting request will want as used now."""
        super().touch_prefix(key if self.disable else self._publishing.key(key))

    def insert(self, params: InsertParams) -> InsertResult:
        """Insert as SGLang does, with the open part that the inserting request was matched with."""
        if self.disable or not self._publishing.active:
            return super().insert(params)
        key = params.key = self._publishing.inserted_key(params.key)
        result = super().insert(params)
        self._publishing.cut(key, result)
        return result

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Insert what a request computed, as SGLang does, and count its session.

        After a prefill, a base that had to be recomputed counts again. A turn that ended well moves
        its session's leaf to where the insert ended; one that ended badly, or is ephemeral, inserts
        nothing: what its prefill left stays, uncounted.
        """
        turn = self._turn_of(req.rid)
        kept = turn is None or self.disable or not req.finished() or _is_kept(turn, req)
        if kept:
            with self._publishing.inserting(req):
                super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        if turn is None or self.disable:
            return
        if not req.finished():
            if turn.kind != "ephemeral":
                self._leaves.reclaim_base(turn, req, self._publishing.open_units_of(req))
        elif kept:
            self._leaves.commit(turn, req)
        else:
            for each in self._components_tuple:
                each.cleanup_after_caching_req(req, is_finished=True)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        """Settle a released request; what a turn that isn't kept left in the tree is dead."""
        super().on_release(req, checkpointed=checkpointed)
        turn = self._turn_of(req.rid)
        if turn is None:
            return
        if req.finished_reason is None:
            self._leaves.note_retracted(req)
        elif not _is_kept(turn, req):
            self._leaves.bury(req)

    # ---- What can be seen from outside ----

    def summary(self, limit: int) -> dict[str, Any]:
        """Describe the tree, and its ``limit`` nodes with most sessions; never token contents.

        Looks at no more than :data:`~describe.SUMMARY_NODES` nodes, whatever the tree holds,
        because nothing decodes meanwhile; ``truncated`` says that there were more to choose from.
        """
        top, truncated = describe.top(self.tree_core, limit)
        return {
            "nodes": self.tree_core.node_count,
            "tokens": self.evictable_size() + self.protected_size(),
            "evictable_tokens": self.evictable_size(),
            "protected_tokens": self.protected_size(),
            "sessions": len(self._paths),
            "pinned_sessions": len(self._paths.order),
            "pinned_tokens": self._paths.pinned_tokens,
            "pin_budget_tokens": self._paths.budget,
            "pins_broken": self._full.pins_broken,
            "eviction_policy": self._eviction_policy,
            "evicted_tokens": {
                kind.name.lower(): tokens for kind, tokens in self._full.evicted_tokens.items()
            },
            "top": [info._asdict() for info in top],
            "truncated": truncated,
        }

    def session_path(self, session_id: str, limit: int = SUMMARY_NODES) -> list[NodeInfo]:
        """A session's last ``limit`` nodes, from the root down; empty if none of its KV is here."""
        leaf = self._paths.leaves.get(session_id)
        return describe.upwards(self._paths.path(session_id), leaf.end if leaf else 0, limit)

    def check_integrity(self) -> None:
        """Recount everything: sessions, pins, the eviction queue, and SGLang's own accounts.

        Raises:
            TreeIntegrityError: Names every account that is wrong.
            AssertionError: SGLang's own check failed.
        """
        wrong = list(self._paths.violations(self.tree_core.nodes()))
        for node in self.tree_core.nodes():
            if getattr(node.key, "open_len", 0):
                wrong.append(f"node {node.id}: it is partly published and partly salted")
            depth = node.parent.depth + len(node.key)
            if node.depth != depth:
                wrong.append(f"node {node.id}: depth {node.depth}, recounted {depth}")
        for node in self.tree_core.evictable_device_leaves:
            queued, key = self._full.queue.queued_key(node.id), self._full.eviction_key(node)
            if queued is None or queued > key:
                wrong.append(f"node {node.id}: queued as {queued}, but is {key}")
        gone = [node for node in self._full.queue if self.tree_core.find(node) is None]
        if gone:
            wrong.append(f"the eviction queue holds nodes that left the tree: {gone}")
        if wrong:
            raise TreeIntegrityError("the cardinal prefix tree is broken:\n  " + "\n  ".join(wrong))
        self.sanity_check()


def register(
    pin_budget: float = 0.5, eviction_policy: str = policies.DEFAULT, publish_budget: float = 0.1
) -> None:
    """Register the tree with SGLang under the name :data:`BACKEND`.

    Raises:
        ValueError: ``pin_budget`` lies outside 0 to 1, there is no such policy, or the name is
            taken.
    """
    pin_budget_tokens(pin_budget, 0)
    policies.POLICIES.load(eviction_policy)
    build = partial(
        CardinalPrefixTree,
        pin_budget=pin_budget,
        eviction_policy=eviction_policy,
        publish_budget=publish_budget,
    )
    register_radix_cache_backend(BACKEND, partial(_create, build=build))


def _create(
    ctx: TreeCacheBuildContext, *, build: Callable[[CacheInitParams], CardinalPrefixTree]
) -> CardinalPrefixTree:
    params = ctx.params
    reason = None
    if ctx.disable_radix_cache:
        reason = "--disable-radix-cache leaves no tree to keep sessions in"
    elif params.enable_session_radix_cache:
        reason = "--enable-session-radix-cache counts sessions in another way"
    elif params.eviction_policy.lower() != "lru":
        reason = (
            f"--radix-eviction-policy {params.eviction_policy} would be ignored; the order of "
            "eviction is --eviction-policy's"
        )
    elif ctx.is_hybrid_swa and ctx.full_tokens_per_layer == 0:
        reason = "the model has no full-attention layers"
    if reason is not None:
        raise ValueError(
            f"the {BACKEND} prefix tree can't be used: {reason}. "
            "Change that, or start the server with --stateful off."
        )
    return create_unified_radix_cache(ctx, cache_class=build)


def _is_kept(turn: Turn, req: Any) -> bool:
    """Whether what a finished turn computed is its session's from now on."""
    return turn.kind != "ephemeral" and ended_well(req)
