"""Turns, rollbacks and forks of a session fit what a rank holds, whatever the rank missed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stateful_sglang.session import errors
from stateful_sglang.session.history import History
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.rank import RankSessions
from stateful_sglang.session.records import SessionOptions
from stateful_sglang.session.session import Session
from stateful_sglang.session.turn import PlannedTurn

ANSWER = Message("assistant", "yes")
tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def plan_of(session: Session, delta: list[int], rewind: int = 0) -> PlannedTurn:
    base_len = max(0, len(session.tip.transcript) - rewind)
    return PlannedTurn(base_len, array("q", delta), None, Head(), [Message("user", "go")])


def opened(session_id: str = "one", **options: Any) -> Session:
    return Session(session_id, "me", History.opened(session_id, Head()), SessionOptions(**options))


@dataclass
class Reference:
    """Tokens of a session by version."""

    versions: dict[int, list[int]] = field(default_factory=lambda: {0: []})
    path: list[int] = field(default_factory=lambda: [0])
    parents: dict[int, list[int]] = field(default_factory=lambda: {0: [0]})


class SessionsOverARank(RuleBasedStateMachine):
    """The rank starts each turn from what the store sends: its prompt must be the committed one."""

    open_sessions = Bundle("open_sessions")

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[str, Session] = {}
        self.ranks = RankSessions()
        self.reference: dict[str, Reference] = {}
        self.turns = 0

    @rule(target=open_sessions)
    def open(self) -> str:
        session = opened(str(len(self.sessions)))
        self.sessions[session.id] = session
        self.reference[session.id] = Reference()
        return session.id

    @rule(
        which=open_sessions,
        delta=tokens,
        output=tokens,
        rewind=st.integers(0, 12),
        fate=st.sampled_from(["published", "published", "aborted", "not recorded"]),
        forked=st.booleans(),
    )
    def turn(
        self, which: str, delta: list[int], output: list[int], rewind: int, fate: str, forked: bool
    ) -> None:
        session, reference = self.sessions[which], self.reference[which]
        plan = plan_of(session, delta, rewind)
        expected = reference.versions[session.version][: plan.base_len] + delta
        base_len, new = session.begin(plan)
        self.turns += 1
        rid = str(self.turns)
        assert self.ranks.begin_turn(which, rid, base_len, new).tolist() == expected
        if forked:
            self._fork(which, session.version)
        self.ranks.finish_turn(rid, None if fate == "aborted" else output)
        if fate != "aborted":
            commit = session.prepare(plan, output, ANSWER, "stop")
            if fate == "published":
                session.publish(commit, held=True)
                reference.versions[commit.version] = expected + output
                reference.path = [*reference.path, commit.version]
                reference.parents[commit.version] = reference.path

    @rule(which=open_sessions, data=st.data())
    def rollback(self, which: str, data: st.DataObject) -> None:
        session, reference = self.sessions[which], self.reference[which]
        version = data.draw(st.sampled_from(sorted(reference.versions)))
        session.rollback(version)
        reference.path = reference.parents[version]

    @rule(target=open_sessions, which=open_sessions, data=st.data())
    def fork(self, which: str, data: st.DataObject) -> str:
        versions = sorted(self.reference[which].versions)
        return self._fork(which, data.draw(st.sampled_from(versions)))

    def _fork(self, which: str, version: int) -> str:
        source, reference = self.sessions[which], self.reference[which]
        forked = source.fork(version)
        self.sessions[forked.id] = forked
        self.ranks.fork(which, forked.id, forked.held_len)
        path = reference.parents[version]
        self.reference[forked.id] = Reference(
            {each: reference.versions[each] for each in path},
            path,
            {each: reference.parents[each] for each in path},
        )
        return forked.id

    @invariant()
    def every_session_is_at_its_version(self) -> None:
        for name, reference in self.reference.items():
            session = self.sessions[name]
            assert session.version == reference.path[-1]
            assert list(session.tip.transcript) == reference.versions[session.version]


TestSessionsOverARank = SessionsOverARank.TestCase
TestSessionsOverARank.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def take_turn(session: Session, delta: list[int], rewind: int = 0) -> None:
    plan = plan_of(session, delta, rewind)
    session.begin(plan)
    session.publish(session.prepare(plan, [7], ANSWER, "stop"), held=True)


def test_a_rollback_sends_the_ranks_nothing_again_that_they_hold() -> None:
    session = opened()
    for delta in ([1], [2], [3]):
        take_turn(session, delta)
    session.rollback(1)
    assert session.held_len == 2
    assert session.begin(plan_of(session, [9])) == (2, array("q", [9]))


def test_a_rollback_past_a_rewind_sends_again_what_the_rewind_dropped() -> None:
    session = opened()
    take_turn(session, [1, 2, 3])
    take_turn(session, [4], rewind=3)
    session.rollback(1)
    assert session.begin(plan_of(session, [9])) == (1, array("q", [2, 3, 7, 9]))


def test_a_session_is_forked_while_its_turn_runs() -> None:
    session = opened(metadata={"who": "me"})
    take_turn(session, [1])
    session.begin(plan_of(session, [2]))
    forked = session.fork(1)
    assert (forked.tip, forked.held_len, forked.options) == (session.tip, 2, session.options)
    assert (forked.tenant, forked.id != session.id) == ("me", True)
    assert forked.record("m").origin == (session.id, 1)


def test_an_offer_at_an_older_tip_fits_the_ranks_too() -> None:
    session = opened()
    take_turn(session, [1, 2, 3])
    plan, tip = plan_of(session, [9]), session.tip
    take_turn(session, [4], rewind=3)
    assert session.offer(plan, tip) == (1, array("q", [2, 3, 7, 9]))


def test_pending_messages_are_a_version_without_tokens() -> None:
    session = opened()
    take_turn(session, [1])
    session.publish(session.prepare_pending([Message("user", "later")]))
    assert (session.version, len(session.tip.transcript), session.held_len) == (2, 2, 2)
    assert [each.content for each in session.history.messages(2)] == ["go", "yes", "later"]


def test_an_edit_continues_an_older_version_and_keeps_what_the_ranks_hold_of_it() -> None:
    session = opened()
    take_turn(session, [1])
    take_turn(session, [2])
    session.publish(session.prepare_pending([Message("user", "else")], session.at(1)))
    assert (session.version, list(session.tip.transcript), session.held_len) == (3, [1, 7], 2)
    with pytest.raises(errors.UnknownCommitError):
        session.at(4)
