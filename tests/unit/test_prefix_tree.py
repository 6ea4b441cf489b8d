"""What the cardinal prefix tree promises, one behaviour a test."""

from __future__ import annotations

import logging
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from prefix_rig import ComponentType, RadixKey, Req, Rig, SamplingParams, chain, params

from stateful_sglang.prefix.policies import POLICIES
from stateful_sglang.runtime.tree import cache
from stateful_sglang.runtime.tree.cache import CardinalPrefixTree, TreeIntegrityError, register
from stateful_sglang.runtime.tree.describe import SUMMARY_NODES
from stateful_sglang.runtime.tree.ends import ended_well, logits_broke

TRUNK = list(range(1500))


def cardinalities(rig: Rig, session_id: str) -> list[tuple[int, int]]:
    """(tokens, cardinality) of a session's nodes from the root down."""
    return [(node.tokens, node.cardinality) for node in rig.tree.session_path(session_id)]


def evict_until(rig: Rig, lost: list[int], held: int) -> None:
    """Evict a token at a time until no more than ``held`` tokens of ``lost`` are left."""
    while rig.cached(lost) > held:
        assert rig.evict(1)
        rig.check()


def test_a_shared_prefix_counts_both_sessions_and_one_after_the_other_closes() -> None:
    rig = Rig()
    rig.turn("a", [], [*TRUNK, 5001, 5002], [7, 8, 9])
    computed = rig.start([*TRUNK, 6001], "b")
    assert computed.kv.cache_protected_len == 1501
    assert computed.kv.kv_committed_len == 1501
    rig.decode(computed, [7, 8])
    rig.finish(computed)
    assert cardinalities(rig, "a")[0] == (1500, 2)
    assert cardinalities(rig, "b") == [(1500, 2), (1, 1), (1, 1)]
    rig.tree.release_session_leaf("b")
    assert cardinalities(rig, "a")[0] == (1500, 1)
    assert rig.tree.session_path("b") == []
    rig.check()


def test_the_second_session_computes_only_its_own_part() -> None:
    rig = Rig()
    rig.turn("a", [], [*TRUNK, 5001], [7])
    before = rig.allocator.available_size()
    rig.turn("b", [], [*TRUNK, 6001, 6002], [7])
    assert before - rig.allocator.available_size() == 2


def test_a_turn_changes_only_the_nodes_that_it_adds() -> None:
    rig = Rig()
    said = rig.turn("a", [], TRUNK, [7, 8])
    touched: list[int] = []
    enter = rig.tree._paths._enter
    rig.tree._paths._enter = lambda node, pinned: (touched.append(node.id), enter(node, pinned))
    rig.turn("a", said, [9, 9], [7, 8])
    assert 1 <= len(touched) <= 2
    assert all(count == 1 for _, count in cardinalities(rig, "a"))


def test_a_session_that_rolled_back_and_branched_counts_once_on_the_trunk() -> None:
    rig = Rig()
    rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    rig.turn("a", [1, 2], [8, 8], [9])
    assert cardinalities(rig, "a") == [(2, 1), (2, 1)]
    assert rig.cached([1, 2, 3, 4, 5]) == 5
    assert rig.evict(1) == 1
    assert rig.cached([1, 2, 3, 4, 5]) < 5, "the superseded tail goes first"
    assert rig.cached([1, 2, 8, 8]) == 4


def test_moving_to_a_branch_leaves_the_trunk_alone() -> None:
    rig = Rig()
    rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    touched: set[int] = set()
    enter = rig.tree._paths._enter
    rig.tree._paths._enter = lambda node, pinned: (touched.add(node.id), enter(node, pinned))
    req = rig.start([1, 2, 8, 8], "a", 2)
    rig.decode(req, [9])
    rig.finish(req)
    trunk, tail = rig.tree.session_path("a")
    assert (trunk.tokens, tail.tokens) == (2, 2)
    assert touched == {tail.id}


def test_a_dead_tail_stays_dead_when_it_is_cut() -> None:
    rig = Rig()
    rig.turn("a", [], [1, 2, 3, 4, 5, 6], [7])
    rig.tree.release_session_leaf("a")
    rig.plain([40, 41, 42])
    rig.plain([1, 2, 3, 50])
    assert rig.evict(1) == 3
    assert rig.cached([1, 2, 3, 4]) == 3
    assert rig.tree.summary(0)["evicted_tokens"]["dead"] == 3


def test_a_turn_that_is_queued_already_ends_at_its_base() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    req = rig.start([*said[:3], 9], "a", 3)
    assert cardinalities(rig, "a") == [(3, 1)]
    rig.abort(req)
    assert cardinalities(rig, "a") == [(3, 1)]
    rig.check()


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_a_turn_that_ends_badly_is_not_counted_and_goes_first(end: str) -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.plain([70, 71, 72])
    req = rig.start([*said, 60, 61], "a", len(said))
    rig.decode(req, [62, 63])
    getattr(rig, end)(req)
    rig.check()
    assert cardinalities(rig, "a")[-1][1] == 1
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 4
    assert rig.cached([*said, 60, 61, 62]) == 7, "what prefill left stays, decoding is dropped"
    rig.evict(1)
    assert rig.cached([*said, 60, 61]) == 4
    assert rig.cached([70, 71, 72]) == 3, "older, but somebody may still want it"


def test_tokens_past_the_stop_are_not_inserted() -> None:
    rig = Rig()
    req = rig.start([1, 2, 3], "a")
    rig.decode(req, [4, 5, 6, 7, 8])
    rig.finish(req, delivered=2)
    rig.check()
    assert rig.cached([1, 2, 3, 4, 5, 6, 7]) == 5
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 5


def test_a_session_whose_kv_was_evicted_counts_again_once_recomputed() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    rig.evict(100)
    assert rig.tree.session_path("a") == []
    req = rig.start([*said, 7], "a", len(said))
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 6
    rig.abort(req)
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 6
    rig.check()


def test_a_retracted_turn_resumes_and_commits_once() -> None:
    rig = Rig()
    req = rig.start([1, 2, 3], "a")
    rig.decode(req, [4, 5])
    rig.retract(req)
    assert rig.tree.session_path("a") == []
    rig.check()
    assert rig.admit(req)
    rig.decode(req, [6])
    rig.finish(req)
    rig.check()
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 5
    assert all(count == 1 for _, count in cardinalities(rig, "a"))


def test_a_flush_forgets_kv_and_sessions_go_on() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.flush()
    rig.check()
    assert rig.tree.summary(5)["sessions"] == 0
    rig.turn("a", said, [6], [7])
    assert sum(tokens for tokens, _ in cardinalities(rig, "a")) == 6


def test_eviction_takes_dead_then_anonymous_then_idle_sessions_then_pinned_ones() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.08)
    idle = rig.turn("idle", [], [10, 11, 12, 13], [14, 15])
    pinned = rig.turn("pinned", [], [20, 21, 22, 23], [24, 25])
    closed = rig.turn("closed", [], [30, 31, 32, 33], [34, 35])
    rig.tree.release_session_leaf("closed")
    rig.plain([40, 41, 42, 43])
    everything = {"closed": closed, "plain": [40, 41, 42, 43], "idle": idle, "pinned": pinned}
    gone: list[str] = []
    while rig.evict(1):
        rig.check()
        gone += [n for n, kv in everything.items() if n not in gone and not rig.cached(kv)]
    assert gone == ["closed", "plain", "idle", "pinned"]
    evicted = rig.tree.summary(0)["evicted_tokens"]
    assert evicted == {"dead": 5, "anonymous": 4, "idle": 5, "pinned": 5}


def test_lru_takes_what_was_used_longest_ago_and_pins_nothing() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.5, eviction_policy="lru")
    live = rig.turn("live", [], [10, 11, 12, 13], [14, 15])
    closed = rig.turn("closed", [], [30, 31, 32, 33], [34, 35])
    rig.tree.release_session_leaf("closed")
    rig.plain([40, 41, 42, 43])
    assert rig.tree.summary(0)["pinned_sessions"] == 0
    evict_until(rig, live, 0)
    assert (rig.cached(closed), rig.cached([40, 41, 42, 43])) == (5, 4)
    evict_until(rig, closed, 0)
    rig.check()
    summary = rig.tree.summary(0)
    assert summary["evicted_tokens"] == {"dead": 5, "anonymous": 0, "idle": 5, "pinned": 0}
    assert summary["eviction_policy"] == "lru"


def test_sessions_go_one_by_one_from_the_tail_and_their_trunk_goes_last() -> None:
    rig = Rig(pool_tokens=400, pin_budget=0)
    trunk = list(range(100, 120))
    said = [rig.turn(f"s{i}", [], [*trunk, i, i], [50 + i, 60]) for i in range(3)]
    for i in range(3):
        evict_until(rig, said[i], 20)
        for later in range(i + 1, 3):
            assert rig.cached(said[later]) == 23
    assert rig.cached(trunk) == 20
    assert cardinalities(rig, "s0") == [(20, 3)]


def test_pins_go_to_the_most_recently_used_sessions_within_the_budget() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.1)
    said = {name: rig.turn(name, [], [ord(name)] * 4, [1, 2]) for name in "abc"}
    summary = rig.tree.summary(0)
    assert (summary["pinned_sessions"], summary["pinned_tokens"]) == (2, 10)
    assert not rig.tree.session_path("a")[0].pinned
    rig.turn("a", said["a"][:5], [], [3])
    assert rig.tree.session_path("a")[0].pinned
    assert not rig.tree.session_path("b")[0].pinned
    rig.tree.release_session_leaf("c")
    assert rig.tree.session_path("b")[0].pinned, "a freed pin goes to who waits for one"
    rig.check()


def test_a_session_that_lost_its_pin_goes_before_those_that_have_one() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.1)
    first = rig.turn("first", [], [1, 2, 3, 4], [5, 6])
    second = rig.turn("second", [], [11, 12, 13, 14], [15, 16])
    rig.plain([20, 21])
    rig.evict(1)
    rig.turn("third", [], [31, 32, 33, 34], [35, 36])
    rig.check()
    evict_until(rig, first, 0)
    evict_until(rig, second, 0)
    assert sum(node.tokens for node in rig.tree.session_path("third")) == 5


def test_a_shared_node_counts_once_in_the_budget() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.26)
    for i in range(3):
        rig.turn(f"s{i}", [], [*range(100, 120), i], [9])
    assert rig.tree.summary(0)["pinned_tokens"] == 23
    assert rig.tree.summary(0)["pinned_sessions"] == 3


def test_a_session_larger_than_the_budget_takes_no_pin_from_others() -> None:
    rig = Rig(pool_tokens=100, pin_budget=0.1)
    rig.turn("small", [], [1, 2, 3], [4])
    rig.turn("large", [], list(range(50, 70)), [4])
    assert rig.tree.session_path("small")[0].pinned
    assert not rig.tree.session_path("large")[0].pinned
    rig.check()


def test_pins_break_when_nothing_else_is_left_and_it_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(pool_tokens=100, pin_budget=1.0)
    rig.turn("a", [], list(range(40)), [90])
    rig.turn("b", [], list(range(50, 90)), [91])
    with caplog.at_level(logging.WARNING):
        req = rig.start(list(range(100, 160)))
    assert req is not None, "a pin must never keep a request out"
    assert rig.tree.session_path("a") == []
    assert rig.tree.session_path("b")
    rig.check()
    rig.finish(req)
    assert rig.evict(1000)
    assert rig.tree.summary(0)["pins_broken"] == 2
    assert sum("pinned sessions lose KV" in record.message for record in caplog.records) == 1


def test_a_pin_locks_nothing() -> None:
    rig = Rig(pool_tokens=100, pin_budget=1.0)
    rig.turn("a", [], list(range(40)), [90])
    assert rig.tree.protected_size() == 0
    assert rig.tree.evictable_size() == 40
    assert rig.tree.session_path("a")[0].locks == 0


def test_the_summary_tells_counts_and_no_contents() -> None:
    rig = Rig(pool_tokens=4000)
    for i in range(4):
        rig.turn(f"s{i}", [], [*range(1000, 1100), 2000 + i], [9, 9])
    summary = rig.tree.summary(2)
    assert summary["nodes"] == 9
    assert summary["tokens"] == summary["evictable_tokens"] == 100 + 4 * 2
    assert summary["sessions"] == 4
    assert [(n["tokens"], n["depth"], n["cardinality"]) for n in summary["top"]] == [
        (100, 100, 4),
        (1, 101, 1),
    ]
    assert set(summary["top"][0]) == {"id", "tokens", "depth", "cardinality", "pinned", "locks"}


def test_the_summary_lists_the_nodes_with_most_sessions_first_wherever_they_are() -> None:
    rig = Rig(pool_tokens=4000)
    for i in range(12):
        rig.turn(f"s{i}", [], [i // 6, 100 + i // 3, 200 + i], [9, 9])
    counts = sorted((node.cardinality for node in rig.tree.tree_core.nodes()), reverse=True)
    for limit in (1, 2, 5, 20, len(counts) + 5):
        summary = rig.tree.summary(limit)
        assert [node["cardinality"] for node in summary["top"]] == counts[:limit]
        assert not summary["truncated"]
    depths = {node["id"]: node["depth"] for node in summary["top"]}
    assert all(depths[n.id] == n.depth for n in rig.tree.session_path("s5"))


def test_the_summary_of_a_wide_tree_looks_at_a_bounded_number_of_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(pool_tokens=8000)
    for i in range(SUMMARY_NODES + 500):
        rig.plain([i, 1])
    looked = 0
    length = RadixKey.__len__

    def counted(key: RadixKey) -> int:
        nonlocal looked
        looked += 1
        return length(key)

    monkeypatch.setattr(RadixKey, "__len__", counted)
    summary = rig.tree.summary(1000)
    assert looked <= SUMMARY_NODES + 1000
    assert len(summary["top"]) == 1000
    assert summary["truncated"]
    assert summary["nodes"] == SUMMARY_NODES + 500
    assert summary["tokens"] == 2 * (SUMMARY_NODES + 500)


def test_a_long_path_is_told_from_its_end() -> None:
    rig = Rig(pool_tokens=4000)
    transcript: list[int] = []
    for i in range(20):
        transcript = rig.turn("a", transcript, [i], [50, 51])
    whole = rig.tree.session_path("a")
    assert rig.tree.session_path("a", 7) == whole[-7:]
    assert whole[0].depth == whole[0].tokens


def test_a_match_gives_the_slots_that_were_computed_for_its_tokens() -> None:
    rig = Rig()
    first = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    rig.turn("b", [], [1, 2, 9, 9], [5, 6])
    rig.turn("a", first, [7, 8], [5])
    prompt = [*first, 7, 8, 0]
    computed = dict(rig.kv_of)
    req = rig.start(prompt)
    slots = rig.rows.req_to_token[req.kv.req_pool_idx, : len(prompt)].tolist()
    assert [computed.get(slot) for slot in slots[:-1]] == chain(prompt)[:-1], "the session's own KV"
    assert slots[-1] not in computed
    assert rig.kv_of[slots[-1]] == chain(prompt)[-1]
    rig.finish(req)
    rig.check()


@pytest.mark.parametrize("page_size", [1, 4])
def test_slots_of_other_tokens_are_noticed(page_size: int) -> None:
    rig = Rig(page_size=page_size)
    rig.turn("a", [], [1] * 8, [5, 6])
    rig.turn("b", [], [2] * 8, [5, 6])
    rig.check()
    one, other = (rig.tree.session_path(name)[0].id for name in "ab")
    nodes = [rig.tree.tree_core.node_by_id(each) for each in (one, other)]
    one, other = (node.component_data[ComponentType.FULL] for node in nodes)
    one.value, other.value = other.value, one.value
    with pytest.raises(AssertionError, match="node"):
        rig.check()
    with pytest.raises(AssertionError, match="KV of other tokens"):
        rig.start([1] * 8 + [5, 7])


@pytest.mark.parametrize("policy", list(POLICIES))
def test_two_trees_fed_the_same_operations_evict_the_same(policy: str) -> None:
    rigs = [Rig(pool_tokens=600, pin_budget=0.3, eviction_policy=policy) for _ in range(2)]
    for step in range(300):
        for rig in rigs:
            name = f"s{step * 7 % 11}"
            if step % 5 == 4:
                rig.tree.release_session_leaf(name)
            elif step % 3 == 0:
                rig.plain([step % 13, step % 7, *range(step % 9)])
            else:
                rig.turn(name, [], [step % 3, *range(200, 230), step], [step % 2, 1])
    first, second = (rig.tree.summary(50) for rig in rigs)
    for node in (*first["top"], *second["top"]):
        del node["id"]
    assert first == second
    assert sum(first["evicted_tokens"].values()) > 0


@pytest.mark.parametrize("policy", list(POLICIES))
def test_an_eviction_does_not_look_at_every_leaf(policy: str) -> None:
    rig = Rig(pool_tokens=8000, eviction_policy=policy)
    for i in range(1500):
        rig.plain([i, 1])
    looked = 0
    key_of = rig.tree._full.queue._key_of

    def counted(node_id: int) -> object:
        nonlocal looked
        looked += 1
        return key_of(node_id)

    rig.tree._full.queue._key_of = counted
    for _ in range(20):
        assert rig.evict(1)
    assert looked <= 60


def test_a_broken_account_is_named() -> None:
    rig = Rig()
    rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.tree.tree_core.nodes()[0].cardinality += 1
    with pytest.raises(TreeIntegrityError, match="cardinality 2"):
        rig.tree.check_integrity()


def test_a_depth_that_the_tree_does_not_have_is_named() -> None:
    rig = Rig()
    rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.tree.tree_core.nodes()[0]._depth = 17
    with pytest.raises(TreeIntegrityError, match="depth 17, recounted 3"):
        rig.tree.check_integrity()


def test_a_policy_is_told_where_a_cut_node_begins_and_ends() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4, 5, 6], [7])
    rig.tree.truncate_session("a", 2)
    rig.plain([*said[:4], 9])
    facts = {node.depth: node.facts for node in rig.tree.tree_core.nodes()}
    assert {depth: told.tokens for depth, told in facts.items()} == {2: 2, 4: 2, 5: 1, 6: 2}
    assert [facts[depth].cardinality for depth in (2, 4)] == [1, 0]
    assert facts[6].dead


def test_requests_without_a_session_leave_no_trace_of_one() -> None:
    rig = Rig()
    rig.plain([1, 2, 3], [4])
    summary = rig.tree.summary(3)
    assert summary["sessions"] == summary["pinned_tokens"] == 0
    assert all(node["cardinality"] == 0 for node in summary["top"])


def test_a_budget_outside_the_pool_is_refused_before_anything_is_registered() -> None:
    with pytest.raises(ValueError, match=r"pin budget is 1\.5"):
        register(1.5)
    with pytest.raises(ValueError, match="pin budget is -1"):
        CardinalPrefixTree(params(100), pin_budget=-1)


def test_an_unknown_policy_is_refused_before_anything_is_registered() -> None:
    with pytest.raises(ValueError, match=r"no eviction policy is called 'fifo'.*cardinal, lru"):
        register(0.5, "fifo")
    with pytest.raises(ValueError, match="fifo"):
        CardinalPrefixTree(params(100), eviction_policy="fifo")


def test_a_server_builds_its_tree_with_the_policy_it_was_started_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: dict[str, Any] = {}
    monkeypatch.setattr(cache, "register_radix_cache_backend", registered.__setitem__)
    monkeypatch.setattr(
        cache, "create_unified_radix_cache", lambda ctx, cache_class: cache_class(ctx.params)
    )
    register(0.25, "lru")
    context = SimpleNamespace(params=params(100), disable_radix_cache=False, is_hybrid_swa=False)
    tree = registered[cache.BACKEND](context)
    assert tree.summary(0)["eviction_policy"] == "lru"


class _Letters:
    """A tokenizer whose every token is one letter, code point 65 onwards."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + token) for token in ids)


def _request(stops: list[str]) -> Req:
    sampling = SamplingParams(max_new_tokens=64)
    sampling.stop_strs, sampling.stop_regex_strs, sampling.stop_str_max_len = stops, [], 16
    req = Req("rid", "", array("q", [1, 2]), sampling, vocab_size=100, eos_token_ids={0})
    req.tokenizer = _Letters()
    return req


def test_a_stop_string_named_like_sglangs_mark_is_no_broken_logit() -> None:
    # Strings of a request come unpickled: equal to SGLang's constant, never the same object.
    stop = "".join(["NaN", " ", "happened"])
    req = _request([stop])
    req.output_ids.extend(ord(letter) - 65 for letter in "say NaN happened")
    req.update_finish_state(new_accepted_len=1)
    assert req.finished_reason.to_json()["matched"] == "NaN happened"
    assert not logits_broke(req)
    assert ended_well(req)


def test_broken_logits_are_told_whatever_a_request_stops_at() -> None:
    req = _request(["".join(["NaN", " ", "happened"])])
    req.output_ids.append(100)  # beyond the vocabulary: what sampling from NaN gives
    req.update_finish_state(new_accepted_len=1)
    assert req.finished_reason.to_json()["matched"] == "NaN happened"
    assert logits_broke(req)
    assert not ended_well(req)


def test_a_good_turn_that_is_barred_from_the_tree_leaves_its_sessions_leaf_where_it_was() -> None:
    rig = Rig()
    said = rig.turn("a", [], list(range(20)), [30, 31])
    before = rig.tree.session_path("a")
    req = rig.start([*said, 40], "a", len(said))
    rig.decode(req, [50, 51])
    # SGLang bars a request whose state it cannot cut at the stop, such as a recurrent one.
    req.skip_radix_cache_insert = True
    rig.finish(req)
    rig.check()
    assert sum(n.tokens for n in rig.tree.session_path("a")) == len(said) - 1
    assert [n.depth for n in rig.tree.session_path("a")] == [n.depth for n in before]
    rig.turn("a", [*said, 40, 50, 51], [60], [61])
    rig.check()
    assert sum(n.tokens for n in rig.tree.session_path("a")) == len(said) + 4


def test_touching_a_waiting_prefix_makes_it_recent_and_moves_no_leaf() -> None:
    rig = Rig(pool_tokens=200, pin_budget=0.0)
    rig.plain(list(range(100, 140)))
    rig.plain(list(range(200, 240)))
    said = rig.turn("a", [], list(range(20)), [30, 31])
    leaf = rig.tree.session_path("a")
    rig.tree.touch_prefix(RadixKey(array("q", [*said, 99])))
    rig.tree.touch_prefix(RadixKey(array("q", range(100, 140))))
    assert rig.tree.session_path("a") == leaf
    rig.evict(40)
    rig.check()
    assert rig.cached(list(range(100, 140))) == 40
    assert rig.cached(list(range(200, 240))) == 0
