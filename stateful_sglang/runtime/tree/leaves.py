"""What becomes of a session's place in the tree: committed, cut, shared by a fork, or dead.

Nothing here is asked of the model: a leaf only names nodes whose KV is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.cache_action import CacheAction

from stateful_sglang.prefix.paths import SessionLeaf
from stateful_sglang.runtime.tree.core import CardinalFullComponent, CardinalNode, CardinalTreeCore
from stateful_sglang.runtime.tree.describe import locks
from stateful_sglang.runtime.tree.open_keys import OpenKey
from stateful_sglang.session.rank import RankTurnKind


class Turn(Protocol):
    """A session's turn in flight, as the scheduler's sessions know it."""

    @property
    def session_id(self) -> str: ...

    @property
    def base_len(self) -> int: ...

    @property
    def kind(self) -> RankTurnKind: ...


class Leaves:
    """Moves the leaves of sessions, and buries what no session will come back to."""

    def __init__(
        self,
        core: CardinalTreeCore,
        full: CardinalFullComponent,
        page_size: int,
        apply_actions: Callable[[Sequence[CacheAction]], None],
    ) -> None:
        """``apply_actions`` does at once what a split or a match asks of the cache."""
        self._core = core
        self._full = full
        self._paths = full.paths
        self._page_size = page_size
        self._apply_actions = apply_actions
        self._found: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """Of the turns in flight: key units of the prompt that were in the tree before them."""
        self._left_at: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """Of retracted turns: the node down to which the tree has what they computed."""

    def key_length(self, tokens: int) -> int:
        """Length of the tree key that stands for so many tokens."""
        units = max(0, tokens - 1) if self._core.is_eagle else tokens
        return units // self._page_size * self._page_size

    def truncate(self, session_id: str, length: int) -> None:
        """Move a session's leaf back to ``length`` tokens if it lies beyond.

        The KV stays; what no other session reaches is dead, and evicted first.
        """
        leaf = self._paths.leaves.get(session_id)
        end = self.key_length(length)
        if leaf is None or leaf.end <= end:
            return
        node = self._ending_at(leaf, end)
        self._paths.move(session_id, node, end if node else 0)
        self._paths.fill_pins()

    def fork(self, source_id: str, session_id: str, length: int) -> None:
        """Give a session a leaf on another's path, at most ``length`` tokens deep.

        Nothing is computed or copied, and the source's leaf stays. Where the source has less KV the
        leaf lies there; where it has none there is no leaf.
        """
        leaf = self._paths.leaves.get(source_id)
        if leaf is None or session_id in self._paths.leaves:
            return
        end = min(leaf.end, self.key_length(length))
        node = self._ending_at(leaf, end)
        if node is not None:
            self._paths.commit(session_id, node, end)

    def commit(self, turn: Turn, req: Any) -> None:
        """Move a session's leaf to where the insert of a turn that ended well ended."""
        if end := req.kv.cache_protected_len:
            self._paths.commit(turn.session_id, self._core.node_by_id(req.last_node), end)

    def reclaim_base(self, turn: Turn, req: Any, open_units: int) -> None:
        """Count a session again on a base that had to be recomputed.

        ``open_units`` of the request's key are published.
        """
        leaf = self._paths.leaves.get(turn.session_id)
        held = leaf.end if leaf else 0
        # The last sampled token's KV is computed with the next turn: a page less is the rule.
        if self.key_length(turn.base_len) - held <= self._page_size:
            return
        if len(req.origin_input_ids) <= turn.base_len:
            return
        key = RadixKey(
            req.origin_input_ids[: turn.base_len],
            req.extra_key,
            is_bigram=self._core.is_eagle,
            cache_salt=req.cache_salt,
        )
        key = OpenKey.of(key, open_units)
        match = self._core.match_prefix(MatchPrefixParams(key=key))
        self._apply_actions(match.cache_actions)
        node = self._core.node_by_id(match.best_match_node)
        end = node.depth
        if end > held:
            self._paths.commit(turn.session_id, node, end)

    def note_found(self, req: Any, length: int) -> None:
        """A turn is matched with the tree: what is found before its first run isn't its own."""
        if not req.retraction_count:
            self._found[req] = length

    def note_retracted(self, req: Any) -> None:
        """A turn gives its KV back; it may come again, or be given up without a word more."""
        if req.last_node is not None:
            self._left_at[req] = req.last_node

    def bury(self, req: Any) -> None:
        """What only this turn put into the tree is dead: evicted before all else.

        So is what was dead until this turn was matched with it, and no session has come to since.
        """
        last = req.last_node if req.last_node is not None else self._left_at.get(req)
        node = self._core.find(last) if last is not None else None
        found = self._found.get(req, 0)
        while node is not None and node.parent is not None:
            if node.depth <= found and not node.has_died:
                break
            if (
                node.cardinality
                or locks(node)
                or not all(c.is_dead for c in node.children.values())
            ):
                break
            node.died_at = node.last_access_time
            self._full.offer(node)
            node = node.parent

    def _ending_at(self, leaf: SessionLeaf, end: int) -> CardinalNode | None:
        """The node of a leaf's path that ends at ``end``, split for it; None is the root."""
        node: Any = leaf.node
        start = leaf.end - len(node.key)
        while start >= end and node.parent is not None:
            node = node.parent
            start -= len(node.key)
        if node.parent is None:
            return None
        if start + len(node.key) > end:
            node, actions = self._core.split(node, end - start)
            self._apply_actions(actions)
        found: CardinalNode = node
        return found
