"""One drafter a session, kept between turns; one a request otherwise, gone with it."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.draft.automaton import SuffixAutomaton
from stateful_sglang.draft.cost import VerifyCost
from stateful_sglang.draft.indexes import ABSENCE_STEPS, EPHEMERAL_TOKENS, DraftIndexes
from stateful_sglang.draft.sources.suffix import SuffixSource

FREE = VerifyCost(0.0, 0.0)


class Turn(NamedTuple):
    session_id: str
    kind: str


def turn_of(rid: str) -> Turn | None:
    session_id, _, name = rid.partition("/")
    return Turn(session_id, "ephemeral" if name.startswith("e") else "turn") if name else None


def indexes(max_bytes: int = 1 << 30) -> DraftIndexes:
    """Request ids are "<session>/<turn>", ephemeral where the turn begins with an "e", or have no
    slash where there is no session."""
    found = DraftIndexes(SuffixSource, 8, FREE, max_bytes)
    found.bind_sessions(turn_of)
    return found


def said(held: DraftIndexes, session_id: str) -> list[int]:
    """The tokens that a session's index follows."""
    automaton = held._sessions[session_id]._source._automaton
    return automaton._tokens.tolist()[: len(automaton)]


def test_a_session_drafts_in_its_second_turn_what_it_generated_in_its_first() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3], [4, 5, 6, 7])
    drafter = held.drafter("s/2", [1, 2, 3, 4, 5, 6, 7, 9], [4])
    assert drafter.draft(3) == [5, 6, 7]


def test_an_aborted_turn_leaves_nothing_behind() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2], [3])
    held.drafter("s/2", [1, 2, 3, 8], [50, 51, 52])
    drafter = held.drafter("s/3", [1, 2, 3, 9], [50])
    assert drafter.draft(8) == []


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=9), st.booleans()), max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_session_matches_like_an_index_built_anew(turns: list[tuple[list[int], bool]]) -> None:
    held = indexes()
    transcript: list[int] = [0]
    for number, (delta, committed) in enumerate(turns):
        prompt, output = [*transcript, *delta], [1, 2, *delta[:2]]
        for step in range(len(output) + 1):
            drafter = held.drafter(f"s/{number}", prompt, output[:step])
            anew = SuffixSource()
            anew.follow(prompt + output[:step])
            assert drafter._source.draft(8) == anew.draft(8)
        if committed:
            transcript = prompt + output[:-1]


def test_a_request_without_a_session_is_forgotten_with_its_finish() -> None:
    held = indexes()
    held.drafter("r", [1, 2], [3])
    assert len(held) == 1
    held.forget("r")
    assert len(held) == 0


def test_a_request_that_vanished_without_notice_is_forgotten_after_a_while() -> None:
    held = indexes()
    held.drafter("gone", [1], [])
    held.drafter("s/1", [1], [])
    for _ in range(ABSENCE_STEPS + 1):
        held.drafter("here", [1], [])
        held.end_step(["here"])
    assert len(held) == 2
    held.drafter("s/2", [1], [])
    assert len(held) == 2


def test_memory_stays_within_its_bound_by_dropping_the_idle_session_unused_longest() -> None:
    tokens = list(range(200))
    held = indexes(max_bytes=int(2.5 * SuffixAutomaton(tokens).nbytes))
    for name in "abc":
        held.drafter(f"{name}/1", tokens, [])
    assert len(held) == 3, "sessions in flight are not dropped"
    for name in "abc":
        held.forget(f"{name}/1")
    held.drafter("c/2", tokens, [])
    assert len(held) == 2
    assert held.drafter("b/2", [*tokens, 7], []).draft(2) == [8, 9]
    assert len(held) == 2
    assert held.drafter("a/2", [*tokens, 7], []).draft(2) == [8, 9]


def test_a_closed_session_is_forgotten_even_in_mid_turn() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2], [])
    held.close("s")
    assert len(held) == 0
    assert held.nbytes == 0


def test_an_ephemeral_turn_drafts_from_its_idle_session_and_leaves_it_as_it_was() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3], [4, 5, 6, 7])
    held.forget("s/1")
    before = said(held, "s")
    drafter = held.drafter("s/e1", [1, 2, 3, 4, 5, 6, 7, 9], [4])
    assert drafter.draft(3) == [5, 6, 7]
    assert held.drafter("s/e1", [1, 2, 3, 4, 5, 6, 7, 9], [4, 50, 51]) is drafter
    held.forget("s/e1")
    assert said(held, "s") == before
    assert len(held) == 1


def test_a_writer_takes_its_index_back_from_an_ephemeral_turn() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3], [4, 5])
    held.forget("s/1")
    assert held.drafter("s/e1", [1, 2, 3, 4, 5, 90], [91]) is not None
    held.drafter("s/2", [1, 2, 3, 4, 5, 6], [7])
    assert said(held, "s") == [1, 2, 3, 4, 5, 6, 7]
    assert held.drafter("s/e1", [1, 2, 3, 4, 5, 90], [91, 92]) is None
    held.forget("s/e1")
    assert said(held, "s") == [1, 2, 3, 4, 5, 6, 7]


def test_beside_a_writer_an_ephemeral_turn_drafts_from_its_own_short_prompt_or_not_at_all() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3], [4, 5, 6])
    assert held.drafter("s/e1", [1, 2, 3, 8, 9, 1, 2], [3]).draft(1) == [8]
    assert said(held, "s") == [1, 2, 3, 4, 5, 6]
    assert held.drafter("s/e2", [0] * (EPHEMERAL_TOKENS + 1), [0]) is None
    held.forget("s/e1")
    held.forget("s/e2")
    assert len(held) == 1


def test_no_long_index_is_built_or_cut_for_an_ephemeral_turn() -> None:
    held = indexes()
    long = list(range(EPHEMERAL_TOKENS + 10))
    assert held.drafter("s/e1", long, []) is None
    assert held.nbytes == 0
    held.drafter("s/1", long, [])
    held.forget("s/1")
    assert held.drafter("s/e2", long[:-1], []) is None, "an earlier version: the index goes on"
    assert said(held, "s") == long
    assert held.drafter("s/e3", [*long, 3], []).draft(2) == [4, 5]


def test_two_ephemeral_turns_do_not_share_an_index() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3, 4], [])
    held.forget("s/1")
    first = held.drafter("s/e1", [1, 2, 3, 4, 5], [])
    assert held.drafter("s/e2", [1, 2, 3, 4, 6], []) is not first
    held.forget("s/e2")
    held.forget("s/e1")
    assert said(held, "s") == [1, 2, 3, 4]


def test_a_rolled_back_session_forgets_its_tail_even_in_mid_turn() -> None:
    held = indexes()
    held.drafter("s/1", [1, 2, 3], [4, 5, 6])
    held.truncate("s", 2)
    assert said(held, "s") == [1, 2]
    held.truncate("unknown", 0)
    assert held.drafter("s/2", [1, 2, 8], [1]).draft(2) == [2, 8]
