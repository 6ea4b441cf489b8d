"""What is read from a journal is what was recorded, whatever was done, reopened or not."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from journal_rig import HEAD, answer, facts, opened, prepared, record_of, run, turn, user

from stateful_sglang.session.history import History
from stateful_sglang.session.journal.base import JournalError, SessionQuery
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.messages import Head, Message, ToolCall
from stateful_sglang.session.records import KeyedResult, SessionOptions, SessionRecord

TEXTS = st.text(st.characters(), max_size=200)  # lone surrogates included
CALLS = st.builds(
    ToolCall, TEXTS, TEXTS, st.recursive(st.none() | st.integers() | TEXTS, st.lists, max_leaves=3)
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["user", "assistant", "tool", "system"]),
    content=TEXTS,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    tool_call_id=st.none() | TEXTS,
    name=st.none() | TEXTS,
    raw=st.none() | TEXTS,
    tokens=st.frozensets(st.sampled_from(["<think>", "</think>"])),
)
SAID = st.lists(MESSAGES | TEXTS.map(answer), max_size=3)
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30) | st.just(list(range(3000)))
HEADS = st.sampled_from([HEAD, Head(), Head("another")])
OPTIONS = st.builds(
    SessionOptions,
    metadata=st.dictionaries(TEXTS, TEXTS, max_size=2),
    ttl_s=st.none() | st.floats(0, 1e6),
    retention=st.sampled_from(["none", "soft", "reserved"]),
    priority=st.integers(-5, 5),
    private=st.booleans(),
)


class Recorded(RuleBasedStateMachine):
    """Sessions in a journal, against the histories that were recorded and a dictionary each."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.journal = self.connect()
        self.histories: dict[str, History] = {}
        self.records: dict[str, SessionRecord] = {}
        self.results: dict[tuple[str, str], KeyedResult] = {}
        self.made = 0

    def connect(self) -> SqliteJournal:
        return SqliteJournal.connect(Path(self.folder.name) / "j", sync="normal", clock=lambda: 1e3)

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.do(self.journal.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    def keyed(self, scope: str, key: str | None) -> KeyedResult | None:
        if key is None:
            return None
        kept = KeyedResult("default", scope, key, "digest", {"made": self.made, "key": key}, 1e3)
        self.results[(scope, key)] = kept
        return kept

    @rule(target=sessions, head=HEADS, said=SAID, options=OPTIONS, key=st.none() | TEXTS)
    def open(self, head: Head, said: list[Message], options: SessionOptions, key: Any) -> str:
        self.made += 1
        session_id = f"s{self.made}"
        history = History.opened(session_id, head, said)
        record = record_of(history, session_id, options=options, used_at=self.made)
        self.do(self.journal.open(record, history, self.keyed("", key)))
        self.histories[session_id], self.records[session_id] = history, record
        return session_id

    @rule(
        session=sessions,
        tokens=TOKENS,
        said=st.none() | SAID,
        pending=SAID,
        head=HEADS,
        key=st.none() | TEXTS,
        data=st.data(),
    )
    def append_or_edit(self, session, tokens, said, pending, head, key, data) -> None:
        history = self.histories[session]
        parent = history.at(data.draw(st.sampled_from([each.version for each in history.commits])))
        commit = history.prepare(
            base_len=data.draw(st.integers(0, len(parent.transcript))),
            tokens=tokens,
            head=head,
            messages=said,
            pending=pending,
            finish_reason=data.draw(st.sampled_from([None, "stop"])),
            parent=parent,
        )
        self.made += 1
        record = record_of(
            history,
            session,
            commit,
            options=self.records[session].options,
            used_at=self.made,
        )
        self.do(self.journal.append(record, commit, self.keyed(session, key)))
        history.publish(commit)
        self.records[session] = record

    @rule(session=sessions, data=st.data(), options=OPTIONS)
    def roll_back_and_touch(self, session: str, data: Any, options: SessionOptions) -> None:
        history = self.histories[session]
        versions = {each.version for each in (*history.commits, *history.published)}
        history.rollback(data.draw(st.sampled_from(sorted(versions))))
        self.made += 1
        record = record_of(history, session, options=options, used_at=self.made)
        self.do(self.journal.update(record))
        self.records[session] = record

    @rule(target=sessions, session=sessions, data=st.data())
    def fork(self, session: str, data: Any) -> str:
        self.made += 1
        session_id = f"s{self.made}"
        source = self.histories[session]
        versions = [each.version for each in (*source.commits, *source.published)]
        history = source.fork(session_id, data.draw(st.sampled_from(versions)))
        record = record_of(history, session_id, used_at=self.made)
        self.do(self.journal.open(record, history))
        self.histories[session_id], self.records[session_id] = history, record
        return session_id

    @rule(session=consumes(sessions), erase=st.booleans())
    def end(self, session: str, erase: bool) -> None:
        self.do(self.journal.end(session, "closed", erase=erase))
        del self.histories[session]
        self.records[session] = replace(self.records[session], state="closed")
        if erase:
            options = replace(self.records[session].options, metadata={})
            self.records[session] = replace(self.records[session], tools=(), options=options)
        self.results = {at: each for at, each in self.results.items() if at[0] != session}

    @rule(session=sessions)
    def forget_in_memory(self, session: str) -> None:
        """From here on what the journal read is what forks and commits build on."""
        self.histories[session] = self.do(self.journal.load(session))

    @rule()
    def reopen(self) -> None:
        self.do(self.journal.close())
        self.journal = self.connect()
        for session in self.histories:
            self.same(session)
        for (scope, key), kept in self.results.items():
            assert self.do(self.journal.result("default", scope, key)) == kept

    def same(self, session: str) -> None:
        expected = self.histories[session]
        found = self.do(self.journal.load(session))
        assert [facts(each) for each in found.commits] == [facts(each) for each in expected.commits]
        assert list(map(facts, found.published)) == list(map(facts, expected.published))
        assert facts(found.origin) == facts(expected.origin)
        assert (found.tip.version, found.newest) == (expected.tip.version, expected.newest)

    @invariant()
    def records_and_counts_are_those_recorded(self) -> None:
        listed = self.do(self.journal.list(SessionQuery("default", state=None)))
        expected = sorted(self.records.values(), key=lambda each: each.used_at, reverse=True)
        assert (listed.records, listed.total) == (expected, len(expected))
        held = self.do(self.journal.totals("default"))
        tokens = sum(self.records[each].tokens for each in self.histories)
        assert held == (len(self.histories), tokens)
        assert self.journal.stats().sessions == len(self.histories)
        for session in self.records.keys() - self.histories.keys():
            assert self.do(self.journal.load(session)) is None

    @invariant()
    def no_commit_is_kept_that_nobody_reaches(self) -> None:
        reached = {
            (each.owner, each.version)
            for history in self.histories.values()
            for tip in (history.origin, *history.published)
            for each in [tip, *self.above(tip)]
        }
        rows = self.do(
            self.journal._read(
                lambda db: db.execute("SELECT owner, version FROM commits").fetchall()
            )
        )
        assert set(rows) == reached

    @staticmethod
    def above(commit: Any) -> list[Any]:
        found = []
        while commit.parent is not None:
            commit = commit.parent
            found.append(commit)
        return found


Recorded.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
test_a_journal_holds_what_was_recorded = Recorded.TestCase


@pytest.mark.parametrize("on_disk", [True, False])
def test_forks_in_memory_and_loaded_ones_share_their_commits(tmp_path: Path, on_disk: bool) -> None:
    async def use(journal: SqliteJournal) -> None:
        source = await opened(journal, "a")
        shared = await turn(journal, source, "a", "shared")
        fork = source.fork("b", 1)
        await journal.open(record_of(fork, "b"), fork)
        del fork
        assert (await journal.load("b")).tip is shared

    run(tmp_path / "j" if on_disk else None, use)


def test_restored_versions_share_storage_heads_and_text(tmp_path: Path) -> None:
    async def fill(journal: SqliteJournal) -> None:
        history = await opened(journal, "a")
        for number in range(5):
            await turn(journal, history, "a", f"text {number}", size=2000)

    async def look(journal: SqliteJournal) -> None:
        history = await journal.load("a")
        runs = {id(each.transcript._run) for each in history.commits[1:]}
        assert len(runs) == 1
        assert len({id(each.conversation.head) for each in history.commits}) == 1
        said = history.tip.conversation.messages[-1]
        assert said.content is said.raw

    run(tmp_path / "j", fill)
    run(tmp_path / "j", look)


def test_a_commit_on_what_is_not_recorded_is_refused_and_leaves_nothing() -> None:
    async def use(journal: SqliteJournal) -> None:
        history = await opened(journal, "a")
        history.publish(prepared(history, [1], [user("lost")]))
        on_lost = prepared(history, [2], [user("next")])
        with pytest.raises(JournalError, match="version 1, which this continues"):
            await journal.append(record_of(history, "a", on_lost), on_lost)
        assert (await journal.record("a")).version == 0
        assert (await journal.load("a")).newest == 0

    run(None, use)


def test_an_ended_session_takes_no_commit(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        history = await opened(journal, "a")
        await journal.end("a", "expired")
        with pytest.raises(JournalError):
            await turn(journal, history, "a", "too late")
        assert (await journal.record("a")).state == "expired"

    run(tmp_path / "j", use)


def test_lists_are_a_tenants_own_filtered_and_paged() -> None:
    async def use(journal: SqliteJournal) -> None:
        for number in range(7):
            kind = SessionOptions(metadata={"kind": "odd" if number % 2 else "even", "\ud800": "x"})
            await opened(journal, f"s{number}", used_at=float(number // 2), options=kind)
        await opened(journal, "other", tenant="t2")
        pages, after = [], None
        while page := (await journal.list(SessionQuery("default", limit=3, after=after))).records:
            pages.append([each.id for each in page])
            after = page[-1].id
        assert pages == [["s6", "s5", "s4"], ["s3", "s2", "s1"], ["s0"]]
        odd = await journal.list(SessionQuery("default", metadata={"kind": "odd", "\ud800": "x"}))
        assert ([each.id for each in odd.records], odd.total) == (["s5", "s3", "s1"], 3)
        assert (await journal.list(SessionQuery("default", after="other"))).records == []
        assert await journal.oldest("default", 2) == ["s0", "s1"]

    run(None, use)


def test_idle_sessions_are_those_past_their_own_or_the_default_time() -> None:
    async def use(journal: SqliteJournal) -> None:
        await opened(journal, "short", used_at=100.0, options=SessionOptions(ttl_s=5))
        await opened(journal, "long", used_at=50.0, options=SessionOptions(ttl_s=500))
        await opened(journal, "default", used_at=90.0)
        assert await journal.idle(104.9, default_ttl_s=None) == []
        assert await journal.idle(105.0, default_ttl_s=None) == ["short"]
        assert await journal.idle(105.0, default_ttl_s=15) == ["default", "short"]
        assert await journal.idle(600.0, default_ttl_s=15, limit=1) == ["long"]

    run(None, use)


def test_a_keyed_result_is_its_tenants_and_its_scopes_and_its_time_ends() -> None:
    now = 1000.0

    async def use(journal: SqliteJournal) -> None:
        nonlocal now
        kept = KeyedResult("default", "a", "k", "d", {"text": "\ud800é", "n": [1.5, None]}, now)
        await journal.keep(kept)
        assert await journal.result("default", "a", "k") == kept
        assert await journal.result("t2", "a", "k") is None
        assert await journal.result("default", "", "k") is None
        now += 24 * 3600 + 1
        assert await journal.result("default", "a", "k") is None

    run(None, use, clock=lambda: now)
