"""Published prefixes in the tree, whatever happens: salts share what was published and no more."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from prefix_rig import CacheInitParams, RadixKey, Rig, params, swa_params
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from stateful_sglang.runtime.tree.open_keys import OpenKey

# Two tokens, so that what one publishes is what many begin with.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
SALTS = st.sampled_from(["a", "b", None])
POOL = 96


class SaltedRig(Rig):
    """Knows for whom each KV slot was computed."""

    def __init__(
        self, page_size: int, budget: float = 1.0, made: CacheInitParams | None = None
    ) -> None:
        super().__init__(pool_tokens=POOL, page_size=page_size, publish_budget=budget, made=made)
        self.computed_for: dict[int, str | None] = {}

    def _compute(self, req: Any, start: int, stop: int) -> None:
        super()._compute(req, start, stop)
        slots = self.rows.req_to_token[req.kv.req_pool_idx, start:stop].tolist()
        self.computed_for.update(dict.fromkeys(slots, req.cache_salt))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that both have."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


class PublishedMachine(RuleBasedStateMachine):
    """A request finds KV of its own salt, and KV of what has been published; nothing else.

    Under a salt that is a whole published prefix, or nothing of it.
    """

    requests = Bundle("requests")
    page_size = 1
    boundary = 0
    """Tokens behind its last one that a unit of a key depends on."""

    def made(self) -> CacheInitParams:
        return params(POOL, self.page_size)

    @initialize(first=st.none() | TOKENS)
    def build(self, first: list[int] | None) -> None:
        self.rig = SaltedRig(self.page_size, made=self.made())
        self.published: dict[str, list[int]] = {}
        """What a request must begin with to share it."""
        self.ever: list[list[int]] = []
        self.sessions: dict[str, list[int]] = {}
        self.busy: set[str] = set()
        self.count = 0
        if first is not None:
            self.publish(first)

    def aligned(self, tokens: Sequence[int]) -> int:
        units = max(0, len(tokens) - self.boundary)
        return units // self.page_size * self.page_size

    def check_found(self, req: Any) -> None:
        found, salt = self.rig.hits[req.rid], req.cache_salt
        tokens = req.full_untruncated_fill_ids
        slots = self.rig.rows.req_to_token[req.kv.req_pool_idx, :found].tolist()
        foreign = [at for at, slot in enumerate(slots) if self.rig.computed_for[slot] != salt]
        shared = [(len(each), common(each, tokens)) for each in self.ever]
        if salt is None:  # the place where open parts are: it finds a part of one as well
            public = max((length for _, length in shared), default=0)
        else:
            public = max((length for whole, length in shared if whole == length), default=0)
        public -= self.boundary
        assert all(at < public for at in foreign), f"KV of another salt at {foreign}"

    @precondition(lambda self: len(self.published) < 4)
    @rule(tokens=TOKENS)
    def publish_another(self, tokens: list[int]) -> None:
        self.publish(tokens)

    def publish(self, tokens: list[int]) -> None:
        self.count += 1
        name = f"p{self.count}"
        units, problem = self.rig.tree.publish(name, tokens)
        assert units == self.aligned(tokens)
        assert (problem is None) == (units > 0)
        if problem is None:
            self.published[name] = tokens[: units + self.boundary]
            self.ever.append(self.published[name])

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        del self.published[name]
        self.rig.tree.unpublish(name)

    @rule(target=requests, tail=TOKENS, salt=SALTS, data=st.data())
    def start(self, tail: list[int], salt: str | None, data: st.DataObject) -> Any:
        req = self.rig.start(self.prompt(tail, data), salt=salt)
        if req is None:
            return multiple()
        self.check_found(req)
        return req

    def prompt(self, tail: list[int], data: st.DataObject) -> list[int]:
        """Begins with what is published or was, with nearly all of it, or with anything."""
        head = data.draw(st.sampled_from([[], *self.ever]))
        return [*head[: len(head) - data.draw(st.integers(0, 1))], *tail]

    @rule(tails=st.lists(st.tuples(TOKENS, SALTS), min_size=1, max_size=4), data=st.data())
    def ask_one_after_the_other(
        self, tails: list[tuple[list[int], str | None]], data: st.DataObject
    ) -> None:
        for tail, salt in tails:
            req = self.rig.start(self.prompt(tail, data), salt=salt)
            if req is not None:
                self.check_found(req)
                self.rig.finish(req, 0)

    @rule(target=requests, delta=TOKENS, salt=SALTS, keep=st.floats(0, 1))
    def start_turn(self, delta: list[int], salt: str | None, keep: float) -> Any:
        name = f"session of {salt}"
        if name in self.busy:
            return multiple()
        transcript = self.sessions.setdefault(name, [])
        base = int(keep * len(transcript))
        req = self.rig.start([*transcript[:base], *delta], name, base, salt=salt)
        if req is None:
            return multiple()
        self.sessions[name] = transcript[:base]
        self.busy.add(name)
        self.check_found(req)
        return req

    @rule(req=requests, tokens=TOKENS)
    def decode(self, req: Any, tokens: list[int]) -> None:
        if req in self.rig.running:
            self.rig.decode(req, tokens)

    @rule(req=consumes(requests), well=st.booleans())
    def end(self, req: Any, well: bool) -> None:
        if req not in self.rig.running:
            return
        turn = self.rig.turns.get(req.rid)
        if well:
            self.rig.finish(req, len(req.output_ids))
        else:
            self.rig.abort(req)
        if turn is not None:
            self.busy.discard(turn.session_id)
            if well:
                self.sessions[turn.session_id] = [*req.origin_input_ids, *req.output_ids]

    @rule(req=requests, wanted=st.integers(0, 40))
    def retract_and_resume(self, req: Any, wanted: int) -> None:
        if req not in self.rig.running:
            return
        turn = self.rig.turns.get(req.rid)
        self.rig.retract(req)
        self.rig.evict(wanted)
        if self.rig.admit(req):
            self.check_found(req)
        elif turn is not None:
            self.busy.discard(turn.session_id)

    @rule(tokens=TOKENS, salt=SALTS)
    def refresh_a_waiting_request(self, tokens: list[int], salt: str | None) -> None:
        self.rig.tree.touch_prefix(RadixKey(array("q", tokens), cache_salt=salt))

    @rule(name=st.sampled_from(["a", "b", None]), kept=st.floats(0, 1))
    def fork_and_leave(self, name: str | None, kept: float) -> None:
        source = f"session of {name}"
        length = int(kept * len(self.sessions.get(source, [])))
        self.rig.tree.fork_session(source, "fork", length)
        self.rig.tree.release_session_leaf("fork")

    @rule(tokens=st.integers(0, 60))
    def evict(self, tokens: int) -> None:
        evictable = self.rig.tree.evictable_size()
        assert self.rig.evict(tokens) >= min(tokens, evictable)

    @rule(tokens=st.integers(1, 20))
    def slide_windows(self, tokens: int) -> None:
        if ComponentType.SWA in self.rig.tree.components:
            self.rig.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=tokens))

    @invariant()
    def accounts_balance(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    @invariant()
    def every_node_is_found_under_its_own_key(self) -> None:
        nodes = [self.rig.tree.tree_core.root_node] if hasattr(self, "rig") else []
        while nodes:
            node = nodes.pop()
            for name, child in node.children.items():
                assert child.key.child_key(self.page_size) == name
                assert node.key.cache_salt in (None, child.key.cache_salt)
                nodes.append(child)


class PagedPublishedMachine(PublishedMachine):
    """The same with pages of several tokens."""

    page_size = 4


class BigramPublishedMachine(PublishedMachine):
    """The same where a draft model's KV depends on the next token, as EAGLE's does."""

    boundary = 1

    def made(self) -> CacheInitParams:
        return dataclasses.replace(super().made(), is_eagle=True)


class PagedBigramPublishedMachine(BigramPublishedMachine):
    """The same with pages of several tokens."""

    page_size = 4


class WindowedPublishedMachine(PublishedMachine):
    """The same where a layer's KV is dropped that is out of its sliding window."""

    def made(self) -> CacheInitParams:
        return swa_params(POOL)


TestPublished = PublishedMachine.TestCase
TestPagedPublished = PagedPublishedMachine.TestCase
TestBigramPublished = BigramPublishedMachine.TestCase
TestPagedBigramPublished = PagedBigramPublishedMachine.TestCase
TestWindowedPublished = WindowedPublishedMachine.TestCase
for case in (
    TestPublished,
    TestPagedPublished,
    TestBigramPublished,
    TestPagedBigramPublished,
    TestWindowedPublished,
):
    case.settings = settings(
        max_examples=80,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
del case  # else it is collected once more

SYSTEM = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
"""Two pages of four tokens, and half a third one."""


def hits(rig: Rig, prompt: list[int], salt: str | None) -> int:
    """Tokens of a whole request's prompt that the tree had."""
    req = rig.start(prompt, salt=salt)
    assert req is not None
    rig.finish(req, 0)
    return rig.hits[req.rid]


def test_the_first_request_of_a_salt_finds_the_published_pages_and_nothing_behind() -> None:
    rig = SaltedRig(4)
    assert rig.tree.publish("p", SYSTEM) == (8, None)
    assert hits(rig, SYSTEM, None) == 0
    prompt = [*SYSTEM, *range(20, 40)]
    assert hits(rig, prompt, "a") == 8
    assert hits(rig, prompt, "a") == 28
    assert hits(rig, prompt, "b") == 8
    assert hits(rig, prompt, "b") == 28
    assert hits(rig, prompt, None) == 8
    rig.check()


def test_what_is_published_no_longer_is_found_by_no_salt() -> None:
    rig = SaltedRig(4)
    rig.tree.publish("p", SYSTEM)
    assert hits(rig, SYSTEM, None) == 0
    rig.tree.unpublish("p")
    assert hits(rig, [*SYSTEM, 20], "a") == 0
    assert hits(rig, [*SYSTEM, 20], "b") == 0
    rig.check()


def test_a_running_request_keeps_to_the_path_that_it_was_matched_with() -> None:
    """Inserted along another, its first pages would belong to two nodes."""
    rig = SaltedRig(4)
    before = rig.start(SYSTEM, salt="a")
    rig.tree.publish("p", SYSTEM)
    after = rig.start(SYSTEM, salt="b")
    rig.check()
    rig.tree.unpublish("p")
    for req in (before, after):
        assert req is not None
        assert rig.decode(req, [30, 31, 32, 33, 34])
        rig.finish(req)
        rig.check()
    assert hits(rig, [*SYSTEM, 30, 31, 32], "a") == 12
    rig.evict(rig.pool_tokens)
    rig.check()
    assert rig.allocator.available_size() == rig.pool_tokens


def test_a_tree_that_publishes_nothing_keeps_sglangs_keys_and_takes_ours_with_the_first() -> None:
    rig = SaltedRig(4)
    hits(rig, [*SYSTEM, *range(20, 40)], "a")
    hits(rig, [*SYSTEM, *range(50, 70)], None)
    assert {type(node.key) for node in rig.tree.tree_core.nodes()} == {RadixKey}
    assert rig.tree.publish("short", SYSTEM[:3])[1] is not None
    assert {type(node.key) for node in rig.tree.tree_core.nodes()} == {RadixKey}
    rig.tree.publish("p", SYSTEM)
    assert {type(node.key) for node in rig.tree.tree_core.nodes()} == {OpenKey}
    assert hits(rig, [*SYSTEM, 90, 91], "b") == 8
    rig.check()


def test_a_conversation_begun_before_the_publication_goes_on_where_its_kv_is() -> None:
    rig = SaltedRig(4)
    long = [*SYSTEM, *range(20, 40)]
    assert hits(rig, long, "a") == 0
    rig.tree.publish("p", SYSTEM)
    assert hits(rig, SYSTEM, None) == 0
    assert hits(rig, long, "a") == 28
    assert hits(rig, [*SYSTEM, 90, 91], "a") == 8
    rig.check()


def test_a_prefix_beyond_the_budget_is_refused_and_room_is_made_by_removing_one() -> None:
    rig = SaltedRig(4, budget=0.1)
    assert rig.tree.publish("first", SYSTEM) == (8, None)
    units, problem = rig.tree.publish("second", SYSTEM)
    assert units == 8
    assert problem is not None
    assert "1 are left of the 9" in problem
    rig.tree.unpublish("first")
    assert rig.tree.publish("second", SYSTEM) == (8, None)


@pytest.mark.parametrize("length", range(4))
def test_less_than_a_page_cannot_be_published(length: int) -> None:
    units, problem = SaltedRig(4).tree.publish("p", SYSTEM[:length])
    assert units == 0
    assert problem is not None
    assert "shorter than a page" in problem


def test_a_request_of_another_adapter_is_no_part_of_it() -> None:
    rig = SaltedRig(4)
    rig.tree.publish("p", SYSTEM)
    key = RadixKey(array("q", SYSTEM), "an adapter", cache_salt="a")
    assert rig.tree._publishing.key(key).child_key(4) == key.child_key(4)


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({"enable_hicache": True}, "keeps KV in tiers"),
        ({"enable_storage": True}, "keeps KV in tiers"),
        ({"enable_external_cache_linker": True}, "keeps KV in tiers"),
        (
            {"components": [SimpleNamespace(component_type=ComponentType.MAMBA)]},
            "keep a running state",
        ),
    ],
)
def test_a_server_that_can_share_no_prefix_says_why_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, server: dict[str, Any], reason: str
) -> None:
    rig = SaltedRig(4)
    with monkeypatch.context() as patched:
        for name, value in server.items():
            patched.setattr(rig.tree.tree_core, name, value)
        units, problem = rig.tree.publish("p", SYSTEM)
    assert units == 8
    assert problem is not None
    assert reason in problem
    assert hits(rig, [*SYSTEM, 20], "a") == hits(rig, [*SYSTEM, 20], "b") == 0
    rig.check()
