"""Both Python clients do everything that the routes do, against the real routes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from engine_double import EngineDouble
from failing_journal import FailingJournal
from session_server import app_of, served

from stateful_sglang import client as frontend

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "search"}}
CALLS = "".join(
    f'<tool_call>{{"name": "search", "arguments": {{"q": "{each}"}}}}</tool_call>' for each in "ab"
)


class Awaited:
    """The synchronous client under the asynchronous one's calls: one test is for both."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        async def call(*args: Any, **options: Any) -> Any:
            args = tuple(each._inner if isinstance(each, Awaited) else each for each in args)
            given = await asyncio.to_thread(lambda: found(*args, **options))
            return Awaited(given) if isinstance(given, frontend.Session) else given

        return call


async def listed(found: Any) -> list[Any]:
    """What an iterator of either kind gives."""
    if hasattr(found, "__aiter__"):
        return [each async for each in found]
    return await asyncio.to_thread(list, found)


Make = Callable[[], Any]


@pytest.fixture(params=[frontend.Client, frontend.AsyncClient])
async def rig(request: pytest.FixtureRequest) -> Any:
    """A client of either kind, and the engine and the journal of its server."""
    engine, journal = EngineDouble(), FailingJournal()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(engine, app_of(engine, journal)))
        client = request.param(url, max_retries=0)
        if isinstance(client, frontend.AsyncClient):
            await stack.enter_async_context(client)
            yield client, engine, journal
        else:
            stack.callback(client.close)
            yield Awaited(client), engine, journal


async def test_tool_results_are_ingested_and_then_answered(rig: Any) -> None:
    client, engine, _ = rig
    session = await client.open(tools=[TOOL], ttl_s=60, priority=1, private=True)
    engine.script = CALLS
    first, second = (await session.append("look")).tool_calls
    engine.script = None
    early = await session.ingest(second.result("b"))
    assert (early.missing, early.pending, early.ready_tokens) == ((first.id,), 1, 0)
    late = await session.ingest(first.result("a"), expected_version=early.version)
    assert late.missing == ()
    turn = await session.generate(sampling={"max_tokens": 4})
    assert turn.version == late.version + 1
    stream = await session.append("more", stream=True)
    assert "".join(await listed(stream)) == stream.turn.text
    view = await session.get()
    assert (view["ttl_s"], view["priority"], view["private"]) == (60, 1, True)


async def test_a_session_is_forked_rolled_back_edited_touched_and_read(rig: Any) -> None:
    client, _, _ = rig
    session = await client.open(metadata={"a": "b"})
    one = await session.append("one")
    two = await session.append("two", expected_version=1)
    fork = await session.fork(1, metadata={"branch": "x"})
    assert (await fork.append("two")).text == two.text
    assert (await session.rollback(1))["version"] == 1
    said = await session.messages(2)
    assert [each["content"] for each in said["messages"]] == ["one", one.text, "two", two.text]
    assert (await session.edit(0, "in short"))["version"] == 3
    assert (await session.messages())["pending"] == [{"role": "user", "content": "in short"}]
    assert (await session.touch(priority=4))["priority"] == 4
    with pytest.raises(frontend.UnknownVersionError) as unknown:
        await session.rollback(99)
    assert unknown.value.version == 3


async def test_an_ephemeral_turn_and_a_key(rig: Any) -> None:
    client, engine, _ = rig
    session = await client.open(idempotency_key="one")
    assert (await client.open(idempotency_key="one")).id == session.id
    title = await session.append("a title, please", ephemeral=True)
    assert title.version == (await session.get())["version"] == 0
    turn = await session.append("hello", idempotency_key="k", detach=True)
    assert await session.append("hello", idempotency_key="k") == turn
    assert len(engine.requests) == 2
    with pytest.raises(frontend.KeyReusedError):
        await session.append("goodbye", idempotency_key="k")


async def test_sessions_are_paged_and_filtered(rig: Any) -> None:
    client, _, _ = rig
    ids = {(await client.open(metadata={"n": str(n)})).id for n in range(5)}
    page = await client.sessions(limit=2)
    assert (len(page), page.total) == (2, 5)
    assert len(await client.sessions(limit=2, after=page.next)) == 2
    everything = client.all_sessions(limit=2)
    if inspect.isawaitable(everything):
        everything = await everything
    assert {each["id"] for each in await listed(everything)} == ids
    assert len(await client.sessions(metadata={"n": "3"})) == 1
    assert await client.sessions(state="closed") == []


async def test_events_are_read_until_the_session_ends(rig: Any) -> None:
    client, _, journal = rig
    session = await client.open()
    events = await session.events()
    await session.append("hello")
    await session.close(erase=True)
    assert [event.name for event in await listed(events)] == [
        "listening",
        "turn.started",
        "turn.committed",
        "closed",
    ]
    assert journal.erased == [session.id]
    await session.close()
    with pytest.raises(frontend.SessionNotFoundError):
        await session.events()


async def test_an_exported_session_is_imported(rig: Any) -> None:
    client, engine, _ = rig
    session = await client.open(system="S")
    await session.append("hello")
    exported = await session.export()
    twin = await client.import_session(exported, idempotency_key="k")
    assert twin.id != session.id
    assert (await twin.append("and?")).text == (await session.append("and?")).text
    engine.model_digest = "another"
    with pytest.raises(frontend.OtherModelError):
        await client.import_session(exported)
    other = await client.import_session(exported, accept_other_model=True)
    assert len((await other.messages())["pending"]) == 2


async def test_what_the_server_cannot_do_has_a_type_of_its_own(rig: Any) -> None:
    client, engine, journal = rig
    session = await client.open()
    journal.broken = "the disk is full"
    with pytest.raises(frontend.NotRecordedError, match="disk is full"):
        await session.touch()
    journal.broken = None
    engine.pause_after = 1
    running = asyncio.create_task(session.append("x"))
    await engine.paused.wait()
    for how in ({"on_busy": "fail"}, {"wait_s": 0.01}):
        with pytest.raises(frontend.SessionBusyError):
            await session.append("y", **how)
    engine.go.set()
    await running


async def test_prefixes_are_published_listed_and_published_no_longer(rig: Any) -> None:
    client, engine, journal = rig
    made = await client.publish(system="Be terse.", tools=(TOOL,), name="all")
    raw = await client.publish(input_ids=(5, 6, 7))
    assert await client.publish(system="Be terse.", tools=[TOOL]) == made
    assert await client.prefixes() == [made, raw]
    assert (made["name"], made["state"], raw["tokens"]) == ("all", "published", 3)
    for _ in range(2):
        await client.unpublish(raw["id"])
    assert list(engine.published) == [made["id"]]
    engine.refuse_prefixes = "there is no room"
    with pytest.raises(frontend.PublishRefusedError, match="no room"):
        await client.publish(text="once")
    engine.refuse_prefixes = None
    journal.broken = "the disk is full"
    with pytest.raises(frontend.NotRecordedError):
        await client.publish(text="once")
