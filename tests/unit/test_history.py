"""A history is what was committed: no operation changes a version that was there before."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stateful_sglang.session.history import Commit, History, UnknownVersionError
from stateful_sglang.session.messages import Head, Message

HEAD = Head(system="be brief")
OWNER = "one"


def user(text: str) -> Message:
    return Message("user", text)


def commit(history: History, tokens: list[int], base_len: int | None = None) -> Commit:
    """Commit tokens and a message that names them."""
    base = len(history.tip.transcript) if base_len is None else base_len
    messages = [*history.tip.pending, user(f"{tokens[:3]}")]
    made = history.prepare(base_len=base, tokens=tokens, head=HEAD, messages=messages)
    history.publish(made)
    return made


def history_of(*turns: list[int]) -> History:
    history = History.opened(OWNER, HEAD)
    for tokens in turns:
        commit(history, tokens)
    return history


@dataclass
class Reference:
    """A history as lists: tokens and messages by version, and the version's parent."""

    versions: dict[int, tuple[list[int], list[Message], int | None]]
    tip: int = 0
    newest: int = 0
    raw: set[int] = field(default_factory=set)

    def path(self, version: int) -> list[int]:
        path, at = [], version
        while at is not None:
            path.insert(0, at)
            at = self.versions[at][2]
        return path


class Histories(RuleBasedStateMachine):
    """Commits, rewinds, forks and rollbacks, in any order, against lists."""

    made = Bundle("made")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[History, Reference]] = []

    def keep(self, history: History, reference: Reference) -> int:
        self.all.append((history, reference))
        return len(self.all) - 1

    @rule(target=made, messages=st.lists(st.builds(user, st.text("ab", max_size=3)), max_size=2))
    def open(self, messages: list[Message]) -> int:
        reference = Reference({0: ([], messages, None)})
        return self.keep(History.opened(OWNER, HEAD, messages), reference)

    @rule(
        which=made,
        tokens=st.lists(st.integers(0, 9), max_size=6) | st.just(list(range(1500))),
        rewind=st.integers(0, 2000) | st.just(0),
        text=st.text("xyz", min_size=1, max_size=4),
        kind=st.sampled_from(["messages", "raw", "never published"]),
    )
    def commit(self, which: int, tokens: list[int], rewind: int, text: str, kind: str) -> None:
        history, reference = self.all[which]
        old, messages, _ = reference.versions[reference.tip]
        base_len = max(0, len(old) - rewind)
        new = None if kind == "raw" else [*history.tip.pending, user(text)]
        pending = history.tip.pending if new is None else ()
        made = history.prepare(
            base_len=base_len, tokens=tokens, head=HEAD, messages=new, pending=pending
        )
        if kind == "never published":
            return
        history.publish(made)
        reference.newest += 1
        assert made.version == reference.newest
        assert made.tokens.tolist() == tokens
        assert list(made.messages) == (new or [])
        after = messages if new is None else [*messages, user(text)]
        entry = (old[:base_len] + tokens, after, reference.tip)
        reference.versions[made.version] = entry
        if new is None or reference.tip in reference.raw:
            reference.raw.add(made.version)
        reference.tip = made.version

    @rule(which=made, data=st.data())
    def rollback(self, which: int, data: st.DataObject) -> None:
        history, reference = self.all[which]
        reference.tip = data.draw(st.sampled_from(sorted(reference.versions)))
        assert history.rollback(reference.tip) is history.tip

    @rule(target=made, which=made, data=st.data())
    def fork(self, which: int, data: st.DataObject) -> int:
        history, reference = self.all[which]
        version = data.draw(st.sampled_from(sorted(reference.versions)))
        path = reference.path(version)
        forked = Reference(
            {each: reference.versions[each] for each in path},
            version,
            version,
            reference.raw.intersection(path),
        )
        return self.keep(history.fork("other", version), forked)

    @rule(which=made, version=st.integers(-1, 30))
    def an_unknown_version_is_an_error(self, which: int, version: int) -> None:
        history, reference = self.all[which]
        if version in reference.versions:
            return
        for ask in (history.at, partial(history.fork, "x"), history.rollback, history.messages):
            with pytest.raises(UnknownVersionError, match=f"no version {version}"):
                ask(version)

    @invariant()
    def every_version_of_every_fork_is_what_it_was(self) -> None:
        for history, reference in self.all:
            assert history.tip.version == reference.tip
            assert [each.version for each in history.commits] == reference.path(reference.tip)
            for version, (tokens, messages, parent) in reference.versions.items():
                made = history.at(version)
                assert (made.version, list(made.transcript)) == (version, tokens)
                assert history.messages(version) == messages
                assert made.conversation.raw == (version in reference.raw)
                assert (made.parent.version if made.parent else None) == parent


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_version_is_never_given_out_twice() -> None:
    history = history_of([1], [2], [3])
    seen = history.at(3)
    history.rollback(1)
    assert commit(history, [9]).version == 4
    assert history.at(3) is seen
    assert list(history.at(4).transcript) == [1, 9]
    assert history.rollback(3) is seen


def test_a_commit_that_is_not_published_leaves_its_version_to_the_next() -> None:
    history = history_of([1])
    history.prepare(base_len=1, tokens=[7], head=HEAD, messages=[user("lost")])
    assert history.tip.version == 1
    assert commit(history, [8]).version == 2
    assert list(history.tip.transcript) == [1, 8]
    assert "lost" not in [message.content for message in history.messages(2)]


def test_a_commit_whose_version_was_given_out_or_whose_parent_is_elsewhere_is_refused() -> None:
    history = history_of([1], [2])
    stale = history.prepare(base_len=2, tokens=[3], head=HEAD, messages=None)
    commit(history, [4])
    with pytest.raises(ValueError, match="prepared for another history"):
        history.publish(stale)
    twin = history_of([1], [2], [4])
    with pytest.raises(ValueError, match="prepared for another history"):
        history.publish(twin.prepare(base_len=1, tokens=[3], head=HEAD, messages=None))


def test_a_commit_may_continue_an_older_version() -> None:
    history = history_of([1], [2], [3])
    made = history.prepare(
        base_len=1, tokens=[], head=HEAD, messages=(), pending=[user("e")], parent=history.at(1)
    )
    history.publish(made)
    assert [each.version for each in history.commits] == [0, 1, 4]
    assert list(history.tip.transcript) == [1]
    assert history.messages(4)[-1] == user("e")
    assert list(history.at(3).transcript) == [1, 2, 3]


def test_a_history_is_restored_from_its_commits() -> None:
    history = history_of([1], [2], [3])
    history.rollback(1)
    again = History.restored(OWNER, history.origin, history.published, tip=1, newest=3)
    assert [each.version for each in again.commits] == [0, 1]
    assert list(again.at(3).transcript) == [1, 2, 3]
    assert commit(again, [9]).version == 4


def test_a_fork_counts_on_from_where_it_was_forked_and_knows_only_the_way_there() -> None:
    history = history_of([1], [2], [3])
    forked = history.fork("other", 1)
    assert commit(forked, [9]).version == 2
    assert list(forked.at(2).transcript) == [1, 9]
    assert list(history.at(2).transcript) == [1, 2]
    with pytest.raises(UnknownVersionError):
        forked.at(3)


def test_going_back_to_the_opening_brings_its_messages_back() -> None:
    history = History.opened(OWNER, HEAD, [user("hello")])
    commit(history, [1])
    assert history.tip.pending == ()
    history.rollback(0)
    assert history.tip.pending == (user("hello"),)
    assert [message.content for message in history.messages(1)] == ["hello", "[1]"]


def test_the_shape_of_a_version_is_that_of_its_messages() -> None:
    history = history_of([1])
    answered = history.prepare(
        base_len=1, tokens=[2], head=HEAD, messages=[Message("assistant", "yes")]
    )
    history.publish(answered)
    assert history.at(1).conversation.shape == (("user",),)
    assert history.at(2).conversation.shape == (("user",), ("assistant",))


@pytest.fixture
def long_history() -> History:
    history = history_of(*([turn] * 100 for turn in range(1000)))
    assert len(history.tip.transcript) == 100_000
    return history


def grown(action: Any) -> int:
    """Bytes that live after an action and did not before."""
    tracemalloc.start()
    try:
        kept = action()
        assert kept is not None
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_fork_shares_tokens_and_messages(long_history: History) -> None:
    forked = long_history.fork("other", 700)
    assert forked.tip is long_history.at(700)
    commit(forked, [1])
    assert forked.tip.transcript._run.parent is long_history.tip.transcript._run
    assert forked.tip.conversation.messages[0] is long_history.tip.conversation.messages[0]


def test_a_fork_costs_a_pointer_and_what_it_adds(long_history: History) -> None:
    def fork() -> list[History]:
        forks = [long_history.fork("other", 300 + each) for each in range(100)]
        for each in forks:
            commit(each, [1] * 10)
        return forks

    assert grown(lambda: [long_history.fork("other", each) for each in range(100)]) < 100 * 500
    # At most 1,024 tokens and as many references to messages, and the commit itself.
    assert grown(fork) < 100 * (1024 * (4 + 8) + 4000)


def test_commits_after_a_rewind_cost_what_they_add(long_history: History) -> None:
    def rewind() -> History:
        for _ in range(100):
            base_len = len(long_history.tip.transcript) - 2000
            commit(long_history, [1] * 2100, base_len)
        return long_history

    # 8400 bytes of tokens, at most 4096 copied, and the commit itself.
    assert grown(rewind) < 100 * (8400 + 4096 + 4000)
