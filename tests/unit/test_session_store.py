"""Turns, rollbacks and forks of the store fit what a rank holds, whatever the rank missed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stateful_sglang.session import errors
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.rank import RankSessions
from stateful_sglang.session.store import Session, SessionStore
from stateful_sglang.session.turn import PlannedTurn

ANSWER = Message("assistant", "yes")
tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def plan_of(session: Session, delta: list[int], rewind: int = 0) -> PlannedTurn:
    base_len = max(0, len(session.tip.transcript) - rewind)
    return PlannedTurn(base_len, array("q", delta), None, Head(), [Message("user", "go")])


@dataclass
class Reference:
    """Tokens of a session by version."""

    versions: dict[int, list[int]] = field(default_factory=lambda: {0: []})
    path: list[int] = field(default_factory=lambda: [0])
    parents: dict[int, list[int]] = field(default_factory=lambda: {0: [0]})


class StoreOverARank(RuleBasedStateMachine):
    """The rank starts each turn from what the store sends: its prompt must be the committed one."""

    open_sessions = Bundle("open_sessions")

    def __init__(self) -> None:
        super().__init__()
        self.store = SessionStore(100)
        self.ranks = RankSessions()
        self.reference: dict[str, Reference] = {}
        self.turns = 0

    @rule(target=open_sessions)
    def open(self) -> str:
        session = self.store.open(Head(), [], {})
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
        session, reference = self.store.get(which), self.reference[which]
        plan = plan_of(session, delta, rewind)
        expected = reference.versions[session.version][: plan.base_len] + delta
        base_len, new = self.store.begin(session, plan)
        self.turns += 1
        rid = str(self.turns)
        assert self.ranks.begin_turn(which, rid, base_len, new).tolist() == expected
        if forked:
            self._fork(which, session.version)
        self.ranks.finish_turn(rid, None if fate == "aborted" else output)
        if fate != "aborted":
            commit = self.store.prepare(session, plan, output, ANSWER, "stop")
            if fate == "published":
                self.store.publish(session, commit)
                reference.versions[commit.version] = expected + output
                reference.path = [*reference.path, commit.version]
                reference.parents[commit.version] = reference.path
        self.store.release(session)

    @rule(which=open_sessions, data=st.data())
    def rollback(self, which: str, data: st.DataObject) -> None:
        session, reference = self.store.get(which), self.reference[which]
        version = data.draw(st.sampled_from(sorted(reference.versions)))
        self.store.rollback(session, version)
        reference.path = reference.parents[version]

    @rule(target=open_sessions, which=open_sessions, data=st.data())
    def fork(self, which: str, data: st.DataObject) -> str:
        versions = sorted(self.reference[which].versions)
        return self._fork(which, data.draw(st.sampled_from(versions)))

    def _fork(self, which: str, version: int) -> str:
        source, reference = self.store.get(which), self.reference[which]
        forked = self.store.fork(source, version)
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
            session = self.store.get(name)
            assert session.version == reference.path[-1]
            assert list(session.tip.transcript) == reference.versions[session.version]
            assert not session.busy


TestStoreOverARank = StoreOverARank.TestCase
TestStoreOverARank.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def take_turn(store: SessionStore, session: Session, delta: list[int], rewind: int = 0) -> None:
    plan = plan_of(session, delta, rewind)
    store.begin(session, plan)
    store.publish(session, store.prepare(session, plan, [7], ANSWER, "stop"))
    store.release(session)


def test_a_rollback_sends_the_ranks_nothing_again_that_they_hold() -> None:
    store = SessionStore(1)
    session = store.open(Head(), [], {})
    for delta in ([1], [2], [3]):
        take_turn(store, session, delta)
    store.rollback(session, 1)
    assert session.held_len == 2
    assert store.begin(session, plan_of(session, [9])) == (2, array("q", [9]))


def test_a_rollback_past_a_rewind_sends_again_what_the_rewind_dropped() -> None:
    store = SessionStore(1)
    session = store.open(Head(), [], {})
    take_turn(store, session, [1, 2, 3])
    take_turn(store, session, [4], rewind=3)
    store.rollback(session, 1)
    assert store.begin(session, plan_of(session, [9])) == (1, array("q", [2, 3, 7, 9]))


def test_a_running_turn_keeps_its_session_from_rolling_back_but_not_from_being_forked() -> None:
    store = SessionStore(2)
    session = store.open(Head(), [], {"who": "me"})
    take_turn(store, session, [1])
    store.begin(session, plan_of(session, [2]))
    with pytest.raises(errors.SessionBusyError):
        store.rollback(session, 0)
    forked = store.fork(session, 1)
    assert (forked.tip, forked.held_len, forked.metadata) == (session.tip, 2, {"who": "me"})
    assert not forked.busy
    with pytest.raises(errors.TooManySessionsError):
        store.fork(session, 1)
