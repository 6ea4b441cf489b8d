"""What forks, rollbacks, prefills and ephemeral turns make of the tree."""

from __future__ import annotations

import pytest
from prefix_rig import Rig


def path(rig: Rig, session_id: str) -> list[tuple[int, int]]:
    """(tokens, cardinality) of a session's nodes from the root down."""
    return [(node.tokens, node.cardinality) for node in rig.tree.session_path(session_id)]


def covered(rig: Rig, session_id: str) -> int:
    return sum(tokens for tokens, _ in path(rig, session_id))


@pytest.mark.parametrize("end", ["finish", "abort", "fail"])
def test_an_ephemeral_turn_leaves_its_session_and_goes_first(end: str) -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    before = path(rig, "a")
    rig.plain([70, 71, 72])
    req = rig.start([*said, 60, 61], "a", len(said), "ephemeral")
    rig.decode(req, [62, 63])
    getattr(rig, end)(req)
    rig.check()
    assert sum(tokens for tokens, _ in before) == covered(rig, "a") == 4
    assert all(count == 1 for _, count in path(rig, "a"))
    rig.evict(1)
    assert rig.cached([*said, 60, 61]) == 4
    assert rig.cached([70, 71, 72]) == 3, "older, but somebody may still want it"


def test_an_ephemeral_turn_on_an_earlier_version_cuts_nothing() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    writer = rig.start([*said, 7], "a", len(said))
    reader = rig.start([*said[:2], 60, 61], "a", 2, "ephemeral")
    assert covered(rig, "a") == 5
    other = rig.start([*said, 80], "a", len(said), "ephemeral")
    rig.finish(reader)
    rig.decode(writer, [8, 9])
    rig.finish(writer)
    rig.finish(other)
    rig.check()
    assert covered(rig, "a") == 8


def test_an_ephemeral_turn_buries_only_what_was_not_there_before() -> None:
    rig = Rig()
    rig.plain([1, 2, 3, 4])
    rig.plain([70, 71])
    req = rig.start([1, 2, 3, 4, 9, 9], "a", 0, "ephemeral")
    rig.finish(req)
    rig.evict(1)
    assert rig.cached([1, 2, 3, 4, 9, 9]) == 4
    rig.evict(1)
    assert rig.cached([70, 71]) == 0, "both are anonymous, and this one is older"
    assert rig.cached([1, 2, 3, 4]) == 4
    assert rig.tree.summary(0)["evicted_tokens"]["dead"] == 2


def test_ephemeral_turns_of_one_question_leave_no_trunk_of_their_own_behind() -> None:
    rig = Rig()
    rig.plain([70, 71])
    for last in (8, 9):
        rig.finish(rig.start([1, 2, 3, last], "a", 0, "ephemeral"))
    rig.check()
    while rig.cached([1, 2, 3]):
        assert rig.cached([70, 71]) == 2
        assert rig.evict(1)


def test_what_an_aborted_try_left_is_dead_again_after_the_next() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2], [3, 4])
    for _ in range(2):
        rig.abort(rig.start([*said, 60, 61, 62], "a", len(said)))
    while rig.cached([*said, 60, 61]) > 3:
        assert rig.evict(1)
    evicted = rig.tree.summary(0)["evicted_tokens"]
    assert (evicted["dead"], evicted["anonymous"]) == (4, 0)


def test_a_retracted_turn_that_is_given_up_leaves_dead_kv() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2], [3, 4])
    rig.plain([70, 71])
    req = rig.start([*said, 60, 61], "a", len(said))
    rig.decode(req, [62])
    rig.retract(req)
    rig.tree.bury_turn(req)
    rig.check()
    rig.evict(1)
    assert (rig.cached([*said, 60, 61]), rig.cached([70, 71])) == (3, 2)


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_prefill_moves_its_sessions_leaf_to_its_end_and_the_next_turn_finds_it(
    page_size: int,
) -> None:
    rig = Rig(page_size=page_size)
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    longer = rig.prefill("a", said, [6, 7, 8, 9, 10, 11, 12])
    rig.check()
    assert covered(rig, "a") == len(longer) // page_size * page_size == 12
    assert all(node.pinned for node in rig.tree.session_path("a"))
    req = rig.start([*longer, 13], "a", len(said))
    assert rig.hits[req.rid] == 12
    rig.decode(req, [14])
    rig.finish(req)
    rig.check()
    assert covered(rig, "a") == 13 // page_size * page_size


def test_a_prefill_that_is_aborted_leaves_the_leaf() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.abort(rig.start([*said, 6, 7], "a", len(said), "prefill"))
    rig.check()
    assert covered(rig, "a") == 4


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_fork_counts_and_pins_its_sources_kv_without_computing(page_size: int) -> None:
    rig = Rig(page_size=page_size)
    said = rig.turn("a", [], list(range(100, 110)), [4, 5])
    free = rig.allocator.available_size()
    rig.tree.fork_session("a", "f", 9)
    rig.check()
    assert rig.allocator.available_size() == free
    assert path(rig, "f") == [(9 // page_size * page_size, 2)]
    assert rig.tree.session_path("f")[0].pinned
    assert covered(rig, "a") == 11 // page_size * page_size
    rig.turn("f", said[:9], [50, 51], [60])
    rig.turn("a", said, [70], [71])
    rig.check()
    rig.tree.release_session_leaf("a")
    rig.check()
    assert path(rig, "f")[0][1] == 1


def test_a_fork_at_the_end_shares_what_is_computed() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.tree.fork_session("a", "f", len(said))
    assert covered(rig, "f") == 4, "the last token has no KV yet"
    rig.check()


def test_a_fork_of_kv_that_is_gone_or_of_nobody_has_no_leaf() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3], [4, 5])
    rig.evict(100)
    rig.tree.fork_session("a", "f", 4)
    rig.tree.fork_session("unknown", "g", 4)
    rig.tree.fork_session("a", "h", 0)
    assert [path(rig, name) for name in "fgh"] == [[], [], []]
    req = rig.start([*said[:4], 9], "f", 4)
    assert covered(rig, "f") == 4, "counted when its first turn recomputes it"
    rig.finish(req)
    rig.check()


def test_a_fork_below_a_page_has_no_leaf() -> None:
    rig = Rig(page_size=4)
    rig.turn("a", [], [1, 2, 3, 4, 5], [6, 7])
    rig.tree.fork_session("a", "f", 3)
    assert path(rig, "f") == []
    rig.check()


def test_a_fork_of_a_running_session_cuts_nothing_of_it() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    req = rig.start([*said, 7], "a", len(said))
    rig.tree.fork_session("a", "f", 3)
    rig.check()
    rig.decode(req, [8, 9])
    rig.finish(req)
    rig.check()
    assert (covered(rig, "a"), covered(rig, "f")) == (8, 3)


def test_a_rollback_makes_the_tail_dead_unless_another_session_has_it() -> None:
    rig = Rig()
    said = rig.turn("a", [], [1, 2, 3, 4], [5, 6])
    rig.tree.fork_session("a", "f", 4)
    rig.plain([70, 71])
    rig.tree.truncate_session("a", 2)
    rig.check()
    assert (covered(rig, "a"), covered(rig, "f")) == (2, 4)
    rig.evict(1)
    assert rig.cached(said) == 4, "the fork's part stays"
    assert rig.cached([70, 71]) == 2
    rig.tree.truncate_session("a", 3)
    rig.tree.truncate_session("unknown", 0)
    assert covered(rig, "a") == 2


def test_kv_of_two_salts_is_never_shared() -> None:
    rig = Rig()
    prompt = [1, 2, 3, 4]
    one = rig.start(prompt, "a", 0, salt="one")
    rig.decode(one, [5])
    rig.finish(one)
    other = rig.start([*prompt, 5], "b", 0, salt="two")
    assert rig.hits[other.rid] == 0
    rig.finish(other)
    rig.tree.fork_session("a", "f", 4)
    forked = rig.start([*prompt, 9], "f", 4, salt="one")
    assert rig.hits[forked.rid] == 4
    rig.finish(forked)
    rig.evict(2)
    rig.tree.truncate_session("a", 0)
    again = rig.start([*prompt, 5, 6], "a", 4, salt="one")
    rig.finish(again)
    rig.check()
    assert covered(rig, "a") == 6
