"""What a session can do beside answering: wait, be repeated, forked, edited, brought back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from engine_double import FORGETFUL, EngineDouble
from one_tenant import OneTenant

from stateful_sglang.service import exchange
from stateful_sglang.service.commands import (
    Append,
    Edit,
    Fork,
    Ingest,
    Key,
    ListSessions,
    NewMessages,
    NewText,
    NewTokens,
    OpenSession,
    Rollback,
    Touch,
    Writing,
)
from stateful_sglang.service.engine import EngineError, TurnProgress, TurnRequest
from stateful_sglang.service.results import TurnResult
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.service.service import Limits
from stateful_sglang.service.turns import TurnReader
from stateful_sglang.session import errors
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.messages import Head, Message, ToolCall
from stateful_sglang.session.records import SessionOptions

pytestmark = pytest.mark.anyio


def user(text: str) -> Message:
    return Message("user", text)


def say(text: str, *, limit: int = 20, **fields: Any) -> Append:
    writing = Writing(**{n: fields.pop(n) for n in list(fields) if n in Writing.__slots__})
    return Append(NewMessages((user(text),)), Sampling(max_tokens=limit), writing=writing, **fields)


def raw(text: str) -> Append:
    return Append(NewText(text), Sampling(max_tokens=20))


class SlowOpening:
    """A real journal that records new sessions when it is let to, or fails."""

    def __init__(self) -> None:
        self.inner = SqliteJournal.connect(None)
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.error: JournalError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def open(self, *args: Any) -> None:
        if self.error is not None:
            raise self.error
        if not self.go.is_set():
            self.began.set()
            await self.go.wait()
        await self.inner.open(*args)


def key(text: str, digest: str = "d") -> Key:
    return Key(text, digest)


async def answer(service: OneTenant, session: str, command: Append) -> TurnResult:
    reader: TurnReader = await service.append(session, command)
    return await reader.result()


async def opened(service: OneTenant, *messages: Message, **fields: Any) -> str:
    command = OpenSession(Head(fields.pop("system", None)), messages, **fields)
    view = await service.open(command)
    return str(view.id)


async def paused(
    engine: EngineDouble, service: OneTenant, session: str, **fields: Any
) -> TurnReader:
    """A turn that has given two tokens and waits for `engine.go`."""
    engine.script, engine.pause_after = "some long answer", 2
    engine.paused.clear()
    engine.go.clear()
    turn: TurnReader = await service.append(session, say("wait", **fields))
    await engine.paused.wait()
    engine.script, engine.pause_after = None, None
    return turn


async def everyone_waits() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


# ---- One writer ----


async def test_appends_wait_their_turn_in_the_order_they_came() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    first = await paused(engine, service, session)
    waiting = [asyncio.create_task(answer(service, session, say(text))) for text in "abc"]
    await everyone_waits()
    assert not any(each.done() for each in waiting)
    engine.go.set()
    assert (await first.result()).version == 1
    assert [(await each).version for each in waiting] == [2, 3, 4]


async def test_who_waits_longer_than_it_said_is_told_the_version() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session)
    with pytest.raises(errors.SessionBusyError, match=r"after a wait of 0\.01 s") as busy:
        await service.append(session, say("x", wait_s=0.01))
    assert busy.value.details["version"] == 0


async def test_a_caller_that_leaves_the_line_holds_up_nobody() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session)
    leaving = asyncio.create_task(service.append(session, say("gone")))
    staying = asyncio.create_task(answer(service, session, say("here")))
    await everyone_waits()
    leaving.cancel()
    await everyone_waits()
    engine.go.set()
    assert (await staying).version == 2
    assert "gone" not in engine.tokenizer.decode(engine.prompts[-1])


async def test_who_will_not_wait_still_gets_past_a_turn_whose_reader_left() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    turn = await paused(engine, service, session)
    asyncio.get_running_loop().call_later(0.01, turn.leave)  # noticed a moment later
    assert (await answer(service, session, say("next", on_busy="fail"))).version == 1


async def test_a_detached_turn_goes_on_without_readers_and_is_in_the_way() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    turn = await paused(engine, service, session, detach=True)
    turn.leave()
    with pytest.raises(errors.SessionBusyError):
        await service.append(session, say("next", on_busy="fail"))
    engine.go.set()
    assert (await answer(service, session, say("next"))).version == 2


async def test_the_expected_version_counts_when_the_callers_turn_comes() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session, detach=True)
    late = asyncio.create_task(service.append(session, say("x", expected_version=0)))
    right = asyncio.create_task(answer(service, session, say("y", expected_version=1)))
    await everyone_waits()
    engine.go.set()
    with pytest.raises(errors.VersionMismatchError):
        await late
    assert (await right).version == 2


async def test_closing_sends_away_all_who_wait() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session)
    waiting = asyncio.create_task(service.append(session, say("x")))
    await everyone_waits()
    await service.close(session)
    with pytest.raises(errors.SessionClosedError):
        await waiting
    with pytest.raises(errors.SessionNotFoundError):
        await service.append(session, say("x"))


# ---- Keys ----


async def test_a_key_gives_the_first_result_again_and_commits_once() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    first = await answer(service, session, say("x", key=key("k")))
    again = await service.append(session, say("x", key=key("k")))
    assert again.replayed
    assert await again.result() == first
    assert [text async for text in again.texts()] == [first.text]
    assert len(engine.requests) == 1
    assert (await service.get(session)).version == 1
    with pytest.raises(errors.KeyReusedError):
        await service.append(session, say("y", key=key("k", "other")))
    other = await opened(service)
    assert (await answer(service, other, say("x", key=key("k")))).session_id == other


async def test_a_key_joins_the_turn_that_runs_and_reads_it_from_its_start() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    turn = await paused(engine, service, session, key=key("k"))
    joined = await service.append(session, say("wait", key=key("k")))
    texts = asyncio.create_task(_all(joined))
    turn.leave()  # its own client is gone, and another one reads
    await everyone_waits()
    engine.go.set()
    assert await texts == "some long answer"
    assert (await joined.result()).version == 1
    assert len(engine.requests) == 1
    with pytest.raises(errors.KeyReusedError):
        await service.append(session, say("z", key=key("k", "other")))


async def _all(reader: TurnReader) -> str:
    return "".join([text async for text in reader.texts()])


async def test_a_key_of_one_that_still_waits_is_joined_too() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session, detach=True)
    tasks = [asyncio.create_task(answer(service, session, say("x", key=key("k")))) for _ in "ab"]
    await everyone_waits()
    engine.go.set()
    assert [(await each).version for each in tasks] == [2, 2]


async def test_a_key_whose_first_caller_left_the_line_is_taken_over() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await paused(engine, service, session, detach=True)
    gone = asyncio.create_task(service.append(session, say("x", key=key("k"))))
    await everyone_waits()
    here = asyncio.create_task(answer(service, session, say("x", key=key("k"))))
    await everyone_waits()
    gone.cancel()
    await everyone_waits()
    engine.go.set()
    assert (await here).version == 2


async def test_a_retry_of_an_abandoned_turn_runs_anew_or_finds_what_was_committed() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    turn = await paused(engine, service, session, key=key("k"))
    turn.leave()
    again = await answer(service, session, say("wait", key=key("k")))
    assert (again.version, len(engine.requests)) == (1, 2)
    engine.linger = asyncio.Event()  # the end beats the abort
    engine.paused.clear()
    turn = await service.append(session, say("y", key=key("l")))
    await engine.paused.wait()
    turn.leave()
    engine.linger.set()
    replayed = await service.append(session, say("y", key=key("l")))
    assert (replayed.replayed, (await replayed.result()).version) == (True, 2)


async def test_a_failed_turn_keeps_no_result_under_its_key() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    engine.end_with = {"type": "abort", "message": "no", "status_code": 500}
    with pytest.raises(errors.EngineFailedError):
        await answer(service, session, say("x", key=key("k")))
    engine.end_with = None
    assert (await answer(service, session, say("x", key=key("k")))).version == 1


async def test_opening_forking_and_ingesting_take_keys_too() -> None:
    service = OneTenant(EngineDouble())
    twice = [await service.open(OpenSession(key=key("o"))) for _ in "ab"]
    assert twice[0] == twice[1]
    session = twice[0].id
    assert (await service.list(ListSessions())).total == 1
    forks = [await service.fork(session, Fork(key=key("f"))) for _ in "ab"]
    assert forks[0] == forks[1]
    ingest = Ingest((user("x"),), Writing(key=key("i")))
    ingested = [await service.ingest(session, ingest) for _ in "ab"]
    assert ingested[0] == ingested[1]
    assert (await service.get(session)).version == 1


# ---- Ephemeral turns ----


async def test_an_ephemeral_turn_answers_from_the_session_and_changes_nothing() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session, twin = await opened(service), await opened(service)
    for each in (session, twin):
        await answer(service, each, say("hello"))
    aside = await answer(service, session, say("a title?", ephemeral=True))
    as_if = await answer(service, twin, say("a title?"))
    assert (aside.text, aside.version) == (as_if.text, 1)
    assert (await service.get(session)).version == 1
    assert (await answer(service, session, say("next"))).version == 2
    assert "title" not in engine.tokenizer.decode(engine.prompts[-1])


async def test_ephemeral_turns_and_the_writer_do_not_wait_for_each_other() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await answer(service, session, say("hello"))
    writer = await paused(engine, service, session)
    aside = await answer(service, session, say("aside", ephemeral=True))
    assert aside.version == 1
    assert "wait" not in engine.tokenizer.decode(engine.prompts[-1])
    engine.go.set()
    assert (await writer.result()).version == 2
    slow = await paused(engine, service, session, ephemeral=True)
    assert (await answer(service, session, say("next"))).version == 3
    engine.go.set()
    assert (await slow.result()).version == 2


async def test_a_keyed_ephemeral_turn_keeps_its_reply_alone() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    first = await answer(service, session, say("x", ephemeral=True, key=key("k")))
    again = await service.append(session, say("x", ephemeral=True, key=key("k")))
    assert (again.replayed, await again.result()) == (True, first)
    assert (await service.messages(session)).messages == ()


# ---- Forks, rollbacks, edits ----


async def test_a_fork_goes_its_own_way_and_a_rank_sends_nothing_again() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service, options=SessionOptions({"who": "me"}))
    for text in ("one", "two", "three"):
        await answer(service, session, say(text))
    fork = await service.fork(session, Fork(version=2))
    assert (fork.version, fork.metadata, fork.forked_from) == (2, {"who": "me"}, (session, 2))
    reply = await answer(service, fork.id, say("other"))
    assert (reply.version, engine.requests[-1].base_len) == (3, reply.usage.history_tokens)
    text = engine.tokenizer.decode(engine.prompts[-1])
    assert "two" in text
    assert "three" not in text
    assert (await service.get(session)).version == 3
    with pytest.raises(errors.UnknownCommitError):
        await service.fork(session, Fork(version=9))


async def test_a_fork_outlives_its_source() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await answer(service, session, say("one"))
    fork = await service.fork(session, Fork())
    await service.close(session, erase=True)
    reply = await answer(service, fork.id, say("two"))
    assert reply.version == 2
    assert "one" in engine.tokenizer.decode(engine.prompts[-1])


async def test_a_rollback_continues_what_was_and_keeps_what_was_left() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    for text in ("one", "two"):
        await answer(service, session, say(text))
    view = await service.rollback(session, Rollback(1))
    assert (view.version, view.tokens) == (1, (await service.get(session)).tokens)
    reply = await answer(service, session, say("three"))
    assert reply.version == 3
    assert engine.requests[-1].base_len == reply.usage.history_tokens
    assert "two" not in engine.tokenizer.decode(engine.prompts[-1])
    left = await service.messages(session, 2)
    assert [m.content for m in left.messages if m.role == "user"] == ["one", "two"]
    with pytest.raises(errors.VersionMismatchError):
        await service.rollback(session, Rollback(1, Writing(expected_version=1)))


async def test_an_edit_says_other_things_in_the_place_of_turns_and_keeps_what_came_after() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session, twin = await opened(service), await opened(service)
    for text in ("one", "two", "three"):
        await answer(service, session, say(text))
    view = await service.edit(session, Edit(after=1, through=2, messages=(user("in short"),)))
    assert view.version == 4
    said = await service.messages(session)
    contents = [m.content for m in (*said.messages, *said.pending) if m.role == "user"]
    assert contents == ["one", "in short", "three"]
    await answer(service, session, say("four"))
    text = engine.tokenizer.decode(engine.prompts[-1])
    assert "two" not in text
    assert text.index("in short") < text.index("three") < text.index("four")
    await answer(service, twin, say("one"))
    assert text.startswith(engine.tokenizer.decode(engine.prompts[-1]))  # the prefix is kept
    assert [m.content for m in (await service.messages(session, 3)).messages][2] == "two"


async def test_an_edit_outside_the_way_to_the_tip_is_refused() -> None:
    service = OneTenant(EngineDouble())
    session = await opened(service)
    for text in ("one", "two"):
        await answer(service, session, say(text))
    await service.rollback(session, Rollback(1))
    with pytest.raises(errors.InvalidInputError, match="not on the way"):
        await service.edit(session, Edit(after=2))
    with pytest.raises(errors.UnknownCommitError):
        await service.edit(session, Edit(after=0, through=9))
    await answer(service, session, say("x"))
    assert (await service.get(session)).version == 3


# ---- Ingest ----

CALLS = tuple(ToolCall(name, "f", {}) for name in ("c1", "c2", "c3"))


def result(call: str, text: str) -> Message:
    return Message("tool", text, tool_call_id=call)


async def with_calls(service: OneTenant) -> str:
    return await opened(service, user("go"), Message("assistant", "", CALLS))


async def test_results_are_computed_as_they_come_and_stand_in_the_order_of_the_calls() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session, twin = await with_calls(service), await with_calls(service)
    third = await service.ingest(session, Ingest((result("c3", "three"),)))
    assert (third.pending, third.missing) == (3, ("c1", "c2"))
    first = await service.ingest(session, Ingest((result("c1", "one"),)))
    assert first.missing == ("c2",)
    assert engine.requests[-1].kind == "prefill"
    before = engine.tokenizer.decode(engine.prompts[-1])
    assert "one" in before
    assert "three" not in before
    last = await service.ingest(session, Ingest((result("c2", "two"),)))
    assert (last.missing, last.version) == ((), 3)
    reply = await answer(service, session, Append(None, Sampling(max_tokens=9)))
    messages = NewMessages((result("c1", "one"), result("c2", "two"), result("c3", "three")))
    at_once = await answer(service, twin, Append(messages, Sampling(max_tokens=9)))
    assert engine.prompts[-1] == engine.prompts[-2]
    assert (reply.text, reply.version) == (at_once.text, 4)


async def test_the_next_turn_begins_with_what_was_ingested() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await answer(service, session, say("hello"))
    held = (await service.get(session)).tokens
    ingested = await service.ingest(session, Ingest((user("a long document"),)))
    ready = engine.prompts[-1]
    await answer(service, session, say("what does it say?"))
    assert engine.prompts[-1][: len(ready)] == ready
    assert ingested.ready_tokens == len(ready) - held


async def test_a_result_for_no_call_or_for_one_that_has_it_is_refused() -> None:
    service = OneTenant(EngineDouble())
    session = await with_calls(service)
    with pytest.raises(errors.InvalidInputError, match="c1, c2, c3"):
        await service.ingest(session, Ingest((result("c9", "x"),)))
    await service.ingest(session, Ingest((result("c1", "x"),)))
    with pytest.raises(errors.InvalidInputError, match="has its result"):
        await service.ingest(session, Ingest((result("c1", "y"),)))


@pytest.mark.parametrize("content", [NewText("once"), NewTokens([40, 41])])
async def test_raw_content_cannot_come_before_what_an_ingest_or_an_edit_left_to_render(
    content: NewText | NewTokens,
) -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    ingested, edited = await opened(service, system="S"), await opened(service)
    await service.ingest(ingested, Ingest((user("first"),)))
    await answer(service, edited, say("one"))
    await service.edit(edited, Edit(after=0, messages=(user("in short"),)))
    for session in (ingested, edited):
        with pytest.raises(errors.InvalidInputError, match="messages"):
            await service.append(session, Append(content))
        await answer(service, session, Append(None, Sampling(max_tokens=4)))
        await answer(service, session, Append(content, Sampling(max_tokens=4)))


async def test_there_must_be_something_to_answer() -> None:
    service = OneTenant(EngineDouble())
    session = await opened(service)
    with pytest.raises(errors.InvalidInputError, match="nothing to answer"):
        await service.append(session, Append(None))


# ---- What the engine lost ----


async def test_a_rank_that_lost_the_session_is_sent_all_of_it_and_nobody_notices() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await answer(service, session, say("one"))
    engine.rank.close(session)
    reply = await answer(service, session, say("two"))
    assert reply.version == 2
    assert [request.base_len for request in engine.requests[-2:]] == [
        reply.usage.history_tokens,
        0,
    ]


# ---- Leaving memory, expiring, coming back ----


async def test_sessions_come_back_after_a_restart_and_go_on_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.sqlite3"
    engine = EngineDouble()
    service = OneTenant(engine, journal=SqliteJournal.connect(path))
    session, twin = await opened(service, system="S"), await opened(service, system="S")
    for each in (session, twin):
        await answer(service, each, say("one"))
        await service.ingest(each, Ingest((user("aside"),)))
    kept = await answer(service, session, say("two", key=key("k")))
    fork = await service.fork(session, Fork(version=1))
    await service.shutdown()
    await answer_is_refused(service, session)
    engine = EngineDouble()
    service = OneTenant(engine, journal=SqliteJournal.connect(path))
    replayed = await service.append(session, say("two", key=key("k")))
    assert (replayed.replayed, await replayed.result()) == (True, kept)
    await answer(service, twin, say("two"))
    one, other = [await answer(service, each, say("three")) for each in (session, twin)]
    assert (one.text, one.version) == (other.text, 4)
    assert (await service.get(fork.id)).forked_from == (session, 1)
    assert (await answer(service, fork.id, say("else"))).version == 2
    await service.shutdown()


async def answer_is_refused(service: OneTenant, session: str) -> None:
    with pytest.raises(errors.DrainingError):
        await service.append(session, say("x"))


async def test_idle_sessions_leave_memory_and_come_back() -> None:
    engine = EngineDouble()
    service = OneTenant(engine, Limits(resident_tokens=2500))
    sessions = [await opened(service) for _ in range(4)]
    for each in sessions:
        await answer(service, each, say("one"))
    directory = service.service._core.directory
    assert len(directory) == 4
    await directory.trim()
    assert directory.tokens <= 2500
    assert len(directory) < 4
    replies = [await answer(service, each, say("two")) for each in sessions]
    assert {(reply.version, reply.text) for reply in replies} == {(2, replies[0].text)}


@pytest.mark.parametrize("holding", ["nothing", "pending text", "versions left by rollbacks"])
async def test_no_kind_of_session_can_fill_the_memory_while_it_is_idle(holding: str) -> None:
    service = OneTenant(EngineDouble(), Limits(resident_tokens=20_000))
    for _ in range(24):
        said = (user("x" * 8000),) if holding == "pending text" else ()
        session = (await service.open(OpenSession(messages=said))).id
        if holding == "versions left by rollbacks":
            for _ in range(3):
                await answer(service, session, say("y" * 400))
                await service.rollback(session, Rollback(0))
    directory = service.service._core.directory
    assert directory.tokens > 20_000
    await directory.trim()
    assert 0 < len(directory) < 24
    if holding != "nothing":
        assert len(directory) < 10, "what they hold beside their last version counts"


async def test_a_session_expires_after_the_time_it_was_given_and_is_gone_not_unknown() -> None:
    service = OneTenant(EngineDouble())
    short = await opened(service, options=SessionOptions(ttl_s=0.05))
    long = await opened(service, options=SessionOptions(ttl_s=60))
    await asyncio.sleep(0.03)
    await service.touch(short, Touch())
    await asyncio.sleep(0.03)
    assert (await service.get(short)).state == "open"
    await asyncio.sleep(0.06)
    with pytest.raises(errors.SessionGoneError, match="expired"):
        await service.get(short)
    with pytest.raises(errors.SessionGoneError):
        await service.append(short, say("x"))
    assert (await service.get(long)).ttl_s == 60
    with pytest.raises(errors.SessionNotFoundError):
        await service.get("never")


async def test_another_model_lists_a_session_and_does_not_continue_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    service = OneTenant(EngineDouble(), journal=SqliteJournal.connect(path))
    session = await opened(service)
    await answer(service, session, say("one"))
    await service.shutdown()
    engine = EngineDouble(template=FORGETFUL)
    engine.model_digest = "another"
    service = OneTenant(engine, journal=SqliteJournal.connect(path))
    assert [each.id for each in (await service.list(ListSessions())).sessions] == [session]
    with pytest.raises(errors.OtherModelError):
        await service.append(session, say("two"))
    assert (await service.close(session)).version == 1
    await service.shutdown()


# ---- Reading ----


async def test_touch_changes_how_a_session_is_kept_and_lists_find_it_by_its_metadata() -> None:
    service = OneTenant(EngineDouble())
    sessions = [await opened(service) for _ in range(3)]
    view = await service.touch(sessions[1], Touch(9.0, "none", 3, {"job": "docs"}))
    assert (view.ttl_s, view.retention, view.priority) == (9.0, "none", 3)
    found = await service.list(ListSessions(metadata={"job": "docs"}))
    assert [each.id for each in found.sessions] == [sessions[1]]
    page = await service.list(ListSessions(limit=2))
    rest = await service.list(ListSessions(limit=2, after=page.next))
    ids = [each.id for each in (*page.sessions, *rest.sessions)]
    assert (ids[0], set(ids), rest.next) == (sessions[1], set(sessions), None)


async def test_events_tell_what_happens_to_a_session_until_its_end() -> None:
    service = OneTenant(EngineDouble())
    session = await opened(service)
    names = []

    async def listen() -> None:
        async for event in service.events(session):
            names.append(event.name)

    listening = asyncio.create_task(listen())
    await everyone_waits()
    await answer(service, session, say("one"))
    await service.ingest(session, Ingest((user("x"),)))
    await service.fork(session, Fork())
    await service.rollback(session, Rollback(1))
    await service.close(session)
    await listening
    assert names == [
        "listening",
        "turn.started",
        "turn.committed",
        "ingested",
        "forked",
        "rolled_back",
        "closed",
    ]


async def test_an_exported_session_goes_on_elsewhere_as_here() -> None:
    here, there = OneTenant(EngineDouble()), OneTenant(EngineDouble())
    session = await opened(here, system="S", options=SessionOptions({"a": "b"}))
    for text in ("one", "two"):
        await answer(here, session, say(text))
    await here.rollback(session, Rollback(1))
    await here.ingest(session, Ingest((user("aside"),)))
    exported = await here.export(session)
    imported = await there.import_(exported)
    assert (imported.version, imported.metadata) == (3, {"a": "b"})
    assert (await answer(there, imported.id, say("x"))).text == (
        await answer(here, session, say("x"))
    ).text
    assert (await there.rollback(imported.id, Rollback(2))).version == 2
    with pytest.raises(errors.OtherModelError):
        await there.import_({**exported, "model": "other"})
    anew = await there.import_({**exported, "model": "other"}, accept_other_model=True)
    assert (anew.version, anew.tokens) == (0, 0)
    said = await there.messages(anew.id)
    assert [m.content for m in said.pending if m.role == "user"] == ["one", "aside"]
    for damage in ({"format": "x"}, {"commits": []}, {"version": 77}, {"commits": [{}]}):
        with pytest.raises(errors.InvalidInputError):
            await there.import_({**exported, **damage})


class Held:
    """A function that begins and then waits to be let go on, if it is on a thread of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.began.set()
        assert self.go_on.wait(10), "the event loop waited for this"
        return self.function(*args, **more)


async def test_others_are_served_while_a_long_session_is_taken_in_or_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = OneTenant(EngineDouble())
    session = await opened(service)
    await answer(service, session, say("one"))
    exported = await service.export(session)

    importing = Held(exchange.imported)
    monkeypatch.setattr(exchange, "imported", importing)
    task = asyncio.create_task(service.import_(exported))
    await asyncio.to_thread(importing.began.wait, 10)
    other = await opened(service)
    importing.go_on.set()
    assert (await task).version == 1

    exporting = Held(exchange.exported)
    monkeypatch.setattr(exchange, "exported", exporting)
    task = asyncio.create_task(service.export(session))
    await asyncio.to_thread(exporting.began.wait, 10)
    await answer(service, other, say("x"))
    await answer(service, session, say("two"))
    exporting.go_on.set()
    assert await task == exported, "what came after the request is not in it"


async def test_an_edit_may_drop_everything() -> None:
    engine = EngineDouble()
    service = OneTenant(engine)
    session = await opened(service)
    await answer(service, session, say("forget me"))
    assert (await service.edit(session, Edit(after=0))).tokens == 0
    await answer(service, session, say("hello"))
    assert "forget" not in engine.tokenizer.decode(engine.prompts[-1])


async def test_a_fork_that_went_back_is_exported_with_what_it_can_go_forward_to() -> None:
    service = OneTenant(EngineDouble())
    source = await opened(service)
    for text in "abc":
        await answer(service, source, say(text))
    fork = (await service.fork(source, Fork())).id
    await service.rollback(fork, Rollback(1))
    moved = (await service.import_(await service.export(fork))).id
    assert (await service.rollback(moved, Rollback(3))).tokens == (await service.get(source)).tokens


async def test_a_fork_has_the_tokens_of_its_version_whatever_its_source_does_meanwhile() -> None:
    engine = EngineDouble(template=FORGETFUL)
    journal = SlowOpening()
    service = OneTenant(engine, journal=journal)
    source = await opened(service)
    for text in ("first", "second"):
        await answer(service, source, say(text))
    journal.go.clear()
    forking = asyncio.create_task(service.fork(source, Fork()))
    await journal.began.wait()
    await answer(service, source, say("another that is quite a bit longer than both of them"))
    journal.go.set()
    fork = (await forking).id
    twin = (await service.import_(await service.export(fork))).id
    replies = [await answer(service, each, raw("x")) for each in (fork, twin)]
    assert replies[0].text == replies[1].text


async def test_a_fork_that_could_not_be_recorded_leaves_nothing_on_the_ranks() -> None:
    engine = EngineDouble()
    journal = SlowOpening()
    service = OneTenant(engine, journal=journal)
    source = await opened(service)
    await answer(service, source, say("hello"))
    journal.error = JournalError("the disk is full")
    with pytest.raises(errors.JournalFailedError):
        await service.fork(source, Fork())
    assert len(engine.rank) == 1


# ---- A turn that the scheduler gave up ----


class Retracting(EngineDouble):
    """Gives its first try up after some tokens, and says something else at the second."""

    def __init__(self, *tries: str) -> None:
        super().__init__()
        self.tries = list(tries)
        self.script, self.pause_after = self.tries.pop(0), 2

    async def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        async for progress in super().run(turn):
            yield progress
            if self.tries and len(progress.output_ids) == 2:
                await self.go.wait()
                self.script, self.pause_after = self.tries.pop(0), None
                raise EngineError("out_of_memory", "retracted")


@pytest.mark.parametrize("second", ["other words", "a"])
async def test_a_turn_whose_words_nobody_read_is_run_again_and_may_say_others(second: str) -> None:
    engine = Retracting("abcdef", second)
    service = OneTenant(engine)
    session = await opened(service)
    engine.go.set()
    turn = await service.append(session, say("hello"))
    assert (await turn.result()).text == second
    assert "".join([text async for text in turn.texts()]) == second


@pytest.mark.parametrize(
    ("second", "committed"), [("abcxyz", True), ("other", False), ("a", False)]
)
async def test_a_turn_of_which_words_were_read_says_them_again_or_fails(
    second: str, committed: bool
) -> None:
    engine = Retracting("abcdef", second)
    service = OneTenant(engine)
    session = await opened(service)
    turn = await service.append(session, say("hello"))
    texts = turn.texts()
    read = [await anext(texts), await anext(texts)]
    engine.go.set()
    read += [text async for text in texts]
    if committed:
        assert "".join(read) == (await turn.result()).text == second
    else:
        assert "".join(read) == "ab"
        with pytest.raises(errors.EngineFailedError, match="after some of it was read"):
            await turn.result()
