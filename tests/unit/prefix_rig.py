"""A small scheduler around the prefix tree: real requests, pools and allocator, no model."""

from __future__ import annotations

import dataclasses
import secrets
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.schedule_batch import (  # noqa: E402 - SGLang imports only after prepare()
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    Req,
)
from sglang.srt.mem_cache.allocator import (  # noqa: E402
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402, F401 - for tests that count
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.mem_cache.unified_cache.components import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from sglang.srt.runtime_context import get_context  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.prefix import policies  # noqa: E402
from stateful_sglang.runtime.tree.cache import CardinalPrefixTree  # noqa: E402
from stateful_sglang.session.rank import RankTurnKind  # noqa: E402

get_context().override_server_args(device="cpu").install()


class RigTurn(NamedTuple):
    """What the scheduler's sessions would answer for a turn in flight."""

    session_id: str
    base_len: int
    prompt_len: int
    kind: RankTurnKind = "turn"


def params(pool_tokens: int, page_size: int = 1, context: int = 16384) -> CacheInitParams:
    """Pools and allocator of a full-attention model on the CPU, without KV memory behind them."""
    if page_size == 1:
        allocator: Any = TokenToKVPoolAllocator(pool_tokens, torch.float16, "cpu", None, False)
    else:
        allocator = PagedTokenToKVPoolAllocator(
            pool_tokens, page_size, torch.float16, "cpu", None, False
        )
    return CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(64, context, "cpu", False),
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        tree_components=(ComponentType.FULL,),
    )


WINDOW = 4
"""Tokens that the sliding-window layer of `swa_params` sees."""


def swa_params(pool_tokens: int) -> CacheInitParams:
    """The same for a model with one full-attention and one sliding-window layer."""
    pool = SWAKVPool(
        size=pool_tokens,
        size_swa=pool_tokens,
        page_size=1,
        dtype=torch.float16,
        head_num=1,
        head_dim=2,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
    )
    allocator = SWATokenToKVPoolAllocator(
        size=pool_tokens,
        size_swa=pool_tokens,
        page_size=1,
        dtype=torch.float16,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )
    return dataclasses.replace(
        params(pool_tokens),
        token_to_kv_pool_allocator=allocator,
        sliding_window_size=WINDOW,
        tree_components=(ComponentType.FULL, ComponentType.SWA),
    )


def chain(tokens: Sequence[int]) -> list[int]:
    """A hash for each position, of all tokens up to it: what its KV depends on."""
    seen, hashes = 0, []
    for token in tokens:
        seen = hash((seen, token))
        hashes.append(seen)
    return hashes


class Rig:
    """One rank: admits, prefills, decodes and finishes requests as SGLang's scheduler would."""

    def __init__(
        self,
        pool_tokens: int = 4096,
        page_size: int = 1,
        pin_budget: float = 0.5,
        eviction_policy: str = policies.DEFAULT,
        tree_of: Any = None,
        made: CacheInitParams | None = None,
        publish_budget: float = 0.1,
    ) -> None:
        made = made or params(pool_tokens, page_size)
        self.pool_tokens = pool_tokens
        self.page_size = page_size
        self.allocator = made.token_to_kv_pool_allocator
        self.rows = made.req_to_token_pool
        self.turns: dict[str, RigTurn] = {}
        self.running: list[Req] = []
        self.hits: dict[str, int] = {}
        """Tokens of each request that the tree had when it was admitted last."""
        self.kv_of: dict[int, int] = {}
        """What each KV slot was computed for: the tokens up to it, as `chain` hashes them."""
        self.after_eviction: Callable[[], None] = lambda: None
        self.tree = (
            tree_of(made)
            if tree_of
            else CardinalPrefixTree(
                made,
                pin_budget=pin_budget,
                eviction_policy=eviction_policy,
                publish_budget=publish_budget,
            )
        )
        if isinstance(self.tree, CardinalPrefixTree):
            self.tree.bind_sessions(self.turns.get)
        assert isinstance(self.tree, UnifiedRadixCache)

    def start(
        self,
        prompt: Sequence[int],
        session_id: str | None = None,
        base_len: int = 0,
        kind: RankTurnKind = "turn",
        salt: str | None = None,
    ) -> Req | None:
        """Admit and prefill a request; None where the pool can't hold it beside what runs."""
        sampling = SamplingParams(max_new_tokens=64)
        req = Req(secrets.token_hex(16), "", array("q", prompt), sampling, cache_salt=salt)
        if session_id is not None:
            self.turns[req.rid] = RigTurn(session_id, base_len, len(prompt), kind)
        return req if self.admit(req) else None

    def admit(self, req: Req) -> bool:
        """Match, lock, allocate and prefill; a request that doesn't fit is dropped."""
        req.init_next_round_input(self.tree)
        req.lock = self.tree.lock(req.last_node)
        fill = len(req.full_untruncated_fill_ids)
        held = self.hits[req.rid] = req.prefix_len
        found = self.tree.prefix_device_indices(req)
        self.check_slots(req.full_untruncated_fill_ids, found)
        slots = self._allocate(self._pages(fill) - held)
        if slots is None:
            self.tree.unlock(req.lock)
            req.lock = None
            self.turns.pop(req.rid, None)
            return False
        req.extend_end = fill
        (row,) = self.rows.alloc([req])
        self.rows.write((row, slice(0, held)), found)
        self.rows.write((row, slice(held, fill)), slots[: fill - held])
        self._compute(req, held, fill)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = fill
        self.running.append(req)
        checkpoint_kv_cache(req, self.tree)
        return True

    def decode(self, req: Req, tokens: Sequence[int]) -> bool:
        """Generate tokens, whose last one's KV is not computed yet; False if the pool is full."""
        before = req.kv.kv_committed_len
        after = len(req.origin_input_ids) + len(req.output_ids) + len(tokens) - 1
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        open_page = self._pages(before) - before
        slots = self._allocate(self._pages(after) - self._pages(before))
        if slots is None:
            return False
        page = row[before - 1] + 1 + torch.arange(open_page) if open_page else slots[:0]
        row[before:after] = torch.cat([page, slots])[: after - before].to(row.dtype)
        req.output_ids.extend(tokens)
        self._compute(req, before, after)
        req.kv.kv_committed_len = req.kv.kv_allocated_len = after
        return True

    def finish(self, req: Req, delivered: int | None = None) -> None:
        """End well; ``delivered`` output tokens reach the client where speculation overshot."""
        req.finished_len = delivered
        self._release(req, FINISH_LENGTH(length=len(req.output_ids)))

    def abort(self, req: Req) -> None:
        """The client went away."""
        self._release(req, FINISH_ABORT("gone"))

    def fail(self, req: Req) -> None:
        """Logits were not numbers."""
        self._release(req, FINISH_MATCHED_STR(matched="NaN happened"))

    def retract(self, req: Req) -> None:
        """Give up the request's KV for now; ``admit`` resumes it."""
        release_kv_cache(req, self.tree, checkpoint=False)
        self.running.remove(req)
        req.reset_for_retract()

    def turn(
        self, session_id: str, base: Sequence[int], delta: Sequence[int], output: Sequence[int]
    ) -> list[int]:
        """A whole turn that ends well; returns the transcript."""
        req = self.start([*base, *delta], session_id, len(base))
        assert req is not None, "the test's pool is too small"
        assert self.decode(req, output), "the test's pool is too small"
        self.finish(req)
        return [*base, *delta, *output]

    def prefill(self, session_id: str, base: Sequence[int], delta: Sequence[int]) -> list[int]:
        """A whole turn that generates nothing, as SGLang ends one of no new tokens."""
        req = self.start([*base, *delta], session_id, len(base), "prefill")
        assert req is not None, "the test's pool is too small"
        req.output_ids.append(0)
        self.finish(req, delivered=0)
        return [*base, *delta]

    def plain(self, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        """A whole request without a session."""
        req = self.start(prompt)
        assert req is not None, "the test's pool is too small"
        assert self.decode(req, [*output, 0]), "the test's pool is too small"
        self.finish(req)

    def evict(self, tokens: int) -> int:
        """Evict at least so many tokens if there are so many to evict; returns how many."""
        evicted = self.tree.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted
        self.after_eviction()
        return evicted

    def flush(self) -> None:
        """What SGLang does on /flush_cache, which it refuses while requests run."""
        assert not self.running
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    def cached(self, tokens: Sequence[int]) -> int:
        """How many leading tokens have KV in the tree, without touching the tree."""
        node, held, page = self.tree.tree_core.root_node, 0, self.page_size
        while len(tokens) - held >= page:
            first = list(tokens[held : held + page])
            children = node.children.values()
            node = next((c for c in children if list(c.key.token_ids[:page]) == first), None)
            if node is None:
                break
            key = list(node.key.token_ids)
            ends = range(page, min(len(key), len(tokens) - held) + 1, page)
            shared = max(end for end in ends if key[:end] == list(tokens[held : held + end]))
            held += shared
            if shared < len(key):
                break
        return held

    def check_slots(self, tokens: Sequence[int], slots: torch.Tensor) -> None:
        """Each slot was last computed for exactly these tokens, up to its own."""
        expected = chain(tokens[: len(slots)])
        wrong = [at for at, slot in enumerate(slots.tolist()) if self.kv_of[slot] != expected[at]]
        assert not wrong, f"KV of other tokens at positions {wrong[:10]}"

    def check(self) -> None:
        """Everything adds up: the tree's accounts, every KV slot is somewhere exactly once, and
        each node holds the slots that were computed for its tokens."""
        self.tree.check_integrity()
        paths = [(child, ()) for child in self.tree.tree_core.root_node.children.values()]
        while paths:
            node, above = paths.pop()
            tokens = (*above, *node.key.token_ids[: len(node.key)])  # a bigram has one more
            held = node.component_data[ComponentType.FULL].value
            assert len(held) == len(node.key)
            expected = chain(tokens)[len(above) :]
            assert [self.kv_of[slot] for slot in held.tolist()] == expected, f"node {node.id}"
            paths += [(child, tokens) for child in node.children.values()]
        held = self.tree.evictable_size() + self.tree.protected_size()
        owned = sum(
            self._pages(req.kv.kv_allocated_len) - req.kv.cache_protected_len
            for req in self.running
        )
        hybrid = getattr(self.allocator, "full_available_size", self.allocator.available_size)
        assert hybrid() + held + owned == self.pool_tokens

    def _compute(self, req: Req, start: int, stop: int) -> None:
        """Note what a forward pass writes to the request's slots at these positions."""
        tokens = [*req.origin_input_ids, *req.output_ids][:stop]
        slots = self.rows.req_to_token[req.kv.req_pool_idx, start:stop].tolist()
        self.kv_of.update(zip(slots, chain(tokens)[start:], strict=True))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size

    def _release(self, req: Req, reason: Any) -> None:
        req.finished_reason = reason
        release_kv_cache(req, self.tree, checkpoint=True)
        self.running.remove(req)
        self.turns.pop(req.rid, None)

    def _allocate(self, tokens: int) -> torch.Tensor | None:
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.evict(short)
        return self.allocator.alloc(tokens)
