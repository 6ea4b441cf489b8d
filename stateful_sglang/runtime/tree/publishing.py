"""Published prefixes in the tree: which part of a request's key is open, for as long as it runs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from sglang.srt.mem_cache.base_prefix_cache import InsertResult
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.cache_action import CacheAction
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.prefix.published import PublishedPrefixes
from stateful_sglang.runtime.tree import open_keys
from stateful_sglang.runtime.tree.core import CardinalTreeCore
from stateful_sglang.runtime.tree.open_keys import OpenKey

_CACHE = "sglang.srt.mem_cache"
ATTACHMENTS = (
    *open_keys.ATTACHMENTS,
    Attachment(
        f"{_CACHE}.unified_cache.unified_tree_core.UnifiedTreeCore.match_full_device_prefix",
        "relies",
        "what a tenant has under its own salt alone is looked at without touching it",
    ),
    Attachment(
        f"{_CACHE}.common.match_kv_cache",
        "relies",
        "a request takes its prefix and its node from the match that decided what is open",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.ReqKvInfo.holds_kv",
        "relies",
        "until then a request is matched anew, from then on its key stays what it was",
    ),
    Attachment(
        f"{_CACHE}.base_prefix_cache.InsertParams", "relies", "its key is made ours in place"
    ),
    Attachment(
        f"{_CACHE}.base_prefix_cache.InsertResult",
        "relies",
        "names the node at which the insert ended: it, or one above it, may have to be cut",
    ),
)


_ANYBODYS: AbstractContextManager[None] = nullcontext()


class Publishing:
    """The published prefixes of one tree, and what they make of requests' keys.

    A request's key is open as far as it was at the match that gave the request its prefix, until
    the request lets its KV go: SGLang inserts into the path that was matched, and an insert along
    another would own KV twice.

    Until something is published the tree's keys are SGLang's own, and cost what SGLang's do.
    """

    def __init__(
        self,
        core: CardinalTreeCore,
        key_length: Callable[[int], int],
        apply_actions: Callable[[Sequence[CacheAction]], None],
        budget: int,
    ) -> None:
        """
        Args:
            core: Where keys are looked up, and nodes cut.
            key_length: Length of the tree key that stands for so many tokens, in whole pages.
            apply_actions: Does at once what a cut asks of the cache.
            budget: Units of keys that may be published.
        """
        self.prefixes = PublishedPrefixes(budget)
        self.active = False
        """Whether anything was ever published here: from then on every key is an `OpenKey`."""
        self._core = core
        self._key_length = key_length
        self._apply_actions = apply_actions
        self._of_request: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._inserting = 0

    def add(self, prefix_id: str, tokens: Sequence[int]) -> tuple[int, str | None]:
        """Publish a prefix: how many of its tokens are shared, and why it can't be done."""
        units = self._key_length(len(tokens))
        problem, core = self.prefixes.problem(units), self._core
        tiers = core.enable_hicache or core.enable_storage or core.enable_external_cache_linker
        if problem is None and tiers:
            problem = (
                "this server keeps KV in tiers, in which published prefixes are not known yet; "
                "start it without them"
            )
        if problem is None and any(
            each.component_type == ComponentType.MAMBA for each in core.components
        ):
            problem = (
                "layers of this model keep a running state, which others could take up at the "
                "prefix's end only by chance; every tenant computes its own"
            )
        if problem is None:
            self._activate()
            raw = units + 1 if core.is_eagle else units
            self.prefixes.add(prefix_id, array("q", tokens[:raw]), units)
        return units, problem

    def remove(self, prefix_id: str) -> None:
        """Forget a prefix: what is matched from now on is salted throughout."""
        self.prefixes.remove(prefix_id)

    def key_of(self, req: Any, key: RadixKey) -> RadixKey:
        """The key that a request is matched with, and that its KV will be inserted under."""
        if not self.active:
            return key
        if not req.kv.holds_kv:
            # SGLang's own sessions hand KV from request to request, past any match.
            self._of_request[req] = 0 if req.session is not None else self._open_units(key)
        return OpenKey.of(key, self.open_units_of(req))

    def key(self, key: RadixKey) -> RadixKey:
        """A key that nothing will be inserted under."""
        return OpenKey.of(key, self._open_units(key)) if self.active else key

    def open_units_of(self, req: Any) -> int:
        """Units of the request's key that are open."""
        return self._of_request.get(req, 0) if self.active else 0

    def inserting(self, req: Any) -> AbstractContextManager[None]:
        """What is inserted within the context is this request's."""
        return self._inserting_for(req) if self.active else _ANYBODYS

    @contextmanager
    def _inserting_for(self, req: Any) -> Iterator[None]:
        self._inserting = self.open_units_of(req)
        try:
            yield
        finally:
            self._inserting = 0

    def inserted_key(self, key: RadixKey) -> OpenKey:
        """The key of an insert, open as far as the inserting request's is."""
        return OpenKey.of(key, self._inserting)

    def cut(self, key: OpenKey, result: InsertResult) -> None:
        """Cut the node that an insert of this key has made partly open, if it made one.

        It is the last one of the key's path, or above that where a sliding window ends in between.
        """
        if not key.open_len:
            return
        node = self._core.find(result.last_device_node)
        while node is not None and node.key is not None and node.key.cache_salt is not None:
            if length := getattr(node.key, "open_len", 0):
                self._apply_actions(self._core.split(node, length)[1])
                return
            node = node.parent

    def _activate(self) -> None:
        if self.active:
            return
        self.active = True
        for node in self._core.nodes():
            node.key = OpenKey.of(node.key)

    def _open_units(self, key: RadixKey) -> int:
        if key.cache_salt is None or key.extra_key is not None or not len(self.prefixes):
            return 0
        units = self.prefixes.open_units(key.token_ids)
        if not units:
            return 0
        # A conversation begun before the prefix was published goes on where its KV is.
        salted, opened = (OpenKey.of(key, length) for length in (0, units))
        own = self._core.match_full_device_prefix(salted)[0]
        return 0 if own and own > self._core.match_full_device_prefix(opened)[0] else units
