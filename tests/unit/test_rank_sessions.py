"""A rank's sessions: what an aborted turn leaves is never continued."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stateful_sglang.session.rank import (
    BusySessionError,
    RankSessions,
    RankTurn,
    RankTurnKind,
    StaleBaseError,
)
from stateful_sglang.session.transcript import Transcript

tokens = st.lists(st.integers(0, 99), max_size=6)


def ids(values: list[int]) -> array[int]:
    return array("q", values)


def test_a_new_session_starts_with_its_first_turn() -> None:
    ranks = RankSessions()
    assert list(ranks.begin_turn("s", "r1", 0, ids([1, 2]))) == [1, 2]
    assert ranks.turn_of("r1") == RankTurn("s", 0, 2)


def test_a_committed_output_is_what_the_next_turn_continues() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    assert list(ranks.begin_turn("s", "r2", 3, ids([4]))) == [1, 2, 3, 4]


def test_an_unpublished_commit_is_dropped_by_the_next_turn() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3, 4])
    assert list(ranks.begin_turn("s", "r2", 0, ids([9]))) == [9]


def test_a_turn_on_tokens_the_rank_lost_is_refused_and_changes_nothing() -> None:
    ranks = RankSessions()
    with pytest.raises(StaleBaseError, match="continues 5 committed tokens, but this rank holds 0"):
        ranks.begin_turn("s", "r1", 5, ids([1]))
    assert "s" not in ranks


def test_a_turn_copies_its_history_without_touching_each_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = RankSessions()
    history = ids(list(range(5000)))
    ranks.begin_turn("s", "r1", 0, history)
    ranks.finish_turn("r1", [7])

    def walked(_transcript: Transcript) -> None:
        raise AssertionError("the transcript was walked token by token")

    monkeypatch.setattr(Transcript, "__iter__", walked)
    prompt = ranks.begin_turn("s", "r2", 5001, ids([8]))
    assert prompt == history + ids([7, 8])
    assert prompt.typecode == "q"


def test_a_second_writer_is_refused_while_the_first_runs() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1]))
    with pytest.raises(BusySessionError, match="already runs turn r1"):
        ranks.begin_turn("s", "r2", 0, ids([2]))
    ranks.finish_turn("r1", None)
    assert list(ranks.begin_turn("s", "r3", 0, ids([2]))) == [2]


def test_closing_during_a_turn_lets_the_turn_end_without_effect() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1]))
    assert ranks.close("s")
    assert ranks.turn_of("r1") == RankTurn("s", 0, 1, "ephemeral"), "a turn that only reads"
    ranks.finish_turn("r1", [2])
    assert "s" not in ranks
    assert not ranks.close("s")


def test_a_session_can_start_anew_while_a_turn_of_its_closed_self_runs() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1]))
    ranks.close("s")
    assert list(ranks.begin_turn("s", "r2", 0, ids([7]))) == [7]
    ranks.finish_turn("r1", [2])
    ranks.finish_turn("r2", [8])
    assert list(ranks.begin_turn("s", "r3", 2, ids([9]))) == [7, 8, 9]


def test_ephemeral_turns_run_beside_a_writer_and_keep_nothing() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    ranks.begin_turn("s", "r2", 3, ids([4]))
    assert list(ranks.begin_turn("s", "e1", 3, ids([50]), "ephemeral")) == [1, 2, 3, 50]
    assert list(ranks.begin_turn("s", "e2", 2, ids([60]), "ephemeral")) == [1, 2, 60]
    assert ranks.turn_of("e2") == RankTurn("s", 2, 3, "ephemeral")
    ranks.finish_turn("e1", [51])
    ranks.finish_turn("r2", [5])
    ranks.finish_turn("e2", None)
    assert list(ranks.begin_turn("s", "r3", 5, ids([6]))) == [1, 2, 3, 4, 5, 6]


def test_an_ephemeral_turn_leaves_a_provisional_commit_alone() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1]))
    ranks.finish_turn("r1", [2])
    ranks.begin_turn("s", "e1", 0, ids([9]), "ephemeral")
    assert list(ranks.begin_turn("s", "r2", 2, ids([3]))) == [1, 2, 3]


def test_an_ephemeral_turn_creates_no_session_and_continues_only_what_is_held() -> None:
    ranks = RankSessions()
    assert list(ranks.begin_turn("s", "e1", 0, ids([1]), "ephemeral")) == [1]
    assert "s" not in ranks
    with pytest.raises(StaleBaseError, match="this rank holds 0"):
        ranks.begin_turn("s", "e2", 1, ids([1]), "ephemeral")
    ranks.finish_turn("e1", [2])
    assert "s" not in ranks


def test_a_prefill_keeps_its_delta_and_none_of_its_output() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "p1", 0, ids([1, 2]), "prefill")
    with pytest.raises(BusySessionError):
        ranks.begin_turn("s", "r1", 0, ids([1]))
    ranks.finish_turn("p1", [99])
    assert list(ranks.begin_turn("s", "p2", 2, ids([3]), "prefill")) == [1, 2, 3]
    ranks.finish_turn("p2", None)
    assert list(ranks.begin_turn("s", "r2", 2, ids([4]))) == [1, 2, 4]


def test_a_rollback_drops_the_tail_and_no_more_than_is_held() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    assert not ranks.rollback("s", 4)
    assert not ranks.rollback("s", 3)
    assert ranks.rollback("s", 2)
    assert not ranks.rollback("unknown", 0)
    with pytest.raises(StaleBaseError, match="this rank holds 2"):
        ranks.begin_turn("s", "r2", 3, ids([9]))
    assert list(ranks.begin_turn("s", "r3", 2, ids([9]))) == [1, 2, 9]


def test_a_turn_whose_base_is_rolled_back_ends_without_effect() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    ranks.begin_turn("s", "r2", 3, ids([4]))
    assert not ranks.rollback("s", 3), "its own base stands"
    assert ranks.rollback("s", 1)
    ranks.finish_turn("r2", [5])
    assert list(ranks.begin_turn("s", "r3", 1, ids([9]))) == [1, 9]


def test_a_fork_continues_what_its_source_held_and_both_go_on_alone() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    ranks.begin_turn("s", "r2", 3, ids([4]))
    ranks.fork("s", "f", 2)  # while the source's next turn runs
    with pytest.raises(StaleBaseError, match="this rank holds 2"):
        ranks.begin_turn("f", "early", 3, ids([9]))
    assert list(ranks.begin_turn("f", "r3", 2, ids([9]))) == [1, 2, 9]
    ranks.finish_turn("r2", [5])
    ranks.finish_turn("r3", [8])
    assert list(ranks.begin_turn("s", "r4", 5, ids([6]))) == [1, 2, 3, 4, 5, 6]
    assert list(ranks.begin_turn("f", "r5", 4, ids([7]))) == [1, 2, 9, 8, 7]


def test_a_fork_outlives_its_source() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    ranks.finish_turn("r1", [3])
    ranks.fork("s", "f", 3)
    ranks.close("s")
    assert list(ranks.begin_turn("f", "r2", 3, ids([4]))) == [1, 2, 3, 4]


def test_a_fork_of_tokens_that_are_not_held_is_refused_and_changes_nothing() -> None:
    ranks = RankSessions()
    ranks.begin_turn("s", "r1", 0, ids([1, 2]))
    with pytest.raises(StaleBaseError, match="this rank holds 0"):
        ranks.fork("s", "f", 1)  # the turn in flight isn't committed
    with pytest.raises(StaleBaseError):
        ranks.fork("unknown", "f", 1)
    assert "f" not in ranks
    with pytest.raises(ValueError, match="a session that exists"):
        ranks.fork("unknown", "s", 0)


class RankMachine(RuleBasedStateMachine):
    """Every operation, turns that commit, abort or are never published, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = RankSessions()
        self.committed: dict[str, list[int]] = {}
        self.running: dict[str, tuple[str, list[int]]] = {}
        self.kinds: dict[str, RankTurnKind] = {}
        self.reading: dict[str, RankTurn] = {}
        """Turns that keep nothing: ephemeral ones, and those whose session left them behind."""
        self.next_rid = 0

    def new_rid(self) -> str:
        self.next_rid += 1
        return f"{self.next_rid:04}"

    def writer(self, session: str) -> str | None:
        return next((rid for rid, (owner, _) in self.running.items() if owner == session), None)

    def leave_behind(self, session: str) -> None:
        rid = self.writer(session)
        if rid is not None:
            del self.running[rid]
            self.reading[rid] = self.ranks.turn_of(rid)._replace(kind="ephemeral")

    @rule(session=st.sampled_from("abc"), delta=tokens, kind=st.sampled_from(["turn", "prefill"]))
    def begin(self, session: str, delta: list[int], kind: RankTurnKind) -> None:
        if self.writer(session) is not None:
            return
        base = self.committed.setdefault(session, [])
        rid = self.new_rid()
        prompt = self.ranks.begin_turn(session, rid, len(base), ids(delta), kind)
        assert list(prompt) == base + delta
        self.running[rid] = (session, base + delta)
        self.kinds[rid] = kind

    @rule(session=st.sampled_from("abcd"), delta=tokens, part=st.floats(0, 1))
    def begin_ephemeral(self, session: str, delta: list[int], part: float) -> None:
        held = self.committed.get(session, [])
        base = held[: int(part * len(held))]
        rid = self.new_rid()
        prompt = self.ranks.begin_turn(session, rid, len(base), ids(delta), "ephemeral")
        assert list(prompt) == base + delta
        self.reading[rid] = RankTurn(session, len(base), len(prompt), "ephemeral")

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), output=st.none() | tokens)
    def end_ephemeral(self, data: st.DataObject, output: list[int] | None) -> None:
        rid = data.draw(st.sampled_from(sorted(self.reading)))
        assert self.ranks.finish_turn(rid, output) == self.reading.pop(rid)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), output=tokens, fate=st.sampled_from(["commit", "abort", "unpublished"]))
    def end(self, data: st.DataObject, output: list[int], fate: str) -> None:
        rid = data.draw(st.sampled_from(sorted(self.running)))
        session, prompt = self.running.pop(rid)
        self.ranks.finish_turn(rid, None if fate == "abort" else output)
        if fate == "commit":
            kept = output if self.kinds[rid] == "turn" else []
            self.committed[session] = prompt + kept

    @rule(session=st.sampled_from("abc"), part=st.floats(0, 1), beyond=st.integers(0, 1))
    def roll_back(self, session: str, part: float, beyond: int) -> None:
        held = self.committed.get(session)
        length = int(part * len(held)) + beyond if held else beyond
        shorter = held is not None and length < len(held)
        # What was never published may be cut too, which no one sees.
        assert self.ranks.rollback(session, length) or not shorter
        if shorter:
            self.committed[session] = held[:length]
            self.leave_behind(session)

    @rule(source=st.sampled_from("abc"), name=st.sampled_from("abc"), part=st.floats(0, 1))
    def fork(self, source: str, name: str, part: float) -> None:
        if name in self.committed:
            return
        held = self.committed.get(source, [])
        length = int(part * len(held))
        self.ranks.fork(source, name, length)
        self.committed[name] = held[:length]

    @rule(session=st.sampled_from("abc"))
    def close(self, session: str) -> None:
        known = self.committed.pop(session, None) is not None
        assert self.ranks.close(session) == known
        self.leave_behind(session)

    @invariant()
    def running_turns_are_known(self) -> None:
        for rid, (session, prompt) in self.running.items():
            turn = self.ranks.turn_of(rid)
            assert turn is not None
            assert turn == RankTurn(
                session, len(self.committed[session]), len(prompt), self.kinds[rid]
            )


TestRankMachine = RankMachine.TestCase
TestRankMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
