"""The Python client: turns, streams and typed errors, against the real routes."""

from __future__ import annotations

import asyncio
import inspect
import json
import typing
from typing import Any

import httpx
import pytest
from engine_double import EngineDouble
from hypothesis import given
from hypothesis import strategies as st
from session_server import app_of, served

from stateful_sglang import client as frontend
from stateful_sglang.api.errors import STATUS
from stateful_sglang.api.native import changes, schemas
from stateful_sglang.client import errors as client_errors
from stateful_sglang.client import types
from stateful_sglang.client.errors import error_of

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "search"}}
CALL = '<tool_call>{"name": "search", "arguments": {"q": "a"}}</tool_call>'


def async_client(engine: EngineDouble, **limits: Any) -> frontend.AsyncClient:
    transport = httpx.ASGITransport(app_of(engine, **limits))
    return frontend.AsyncClient("http://test", transport=transport, max_retries=0)


async def in_thread(url: str, work: Any) -> Any:
    def run() -> Any:
        with frontend.Client(url, max_retries=0) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_a_conversation_with_tools() -> None:
    engine = EngineDouble()

    def work(client: frontend.Client) -> None:
        with client.open(system="S", tools=[TOOL]) as session:
            engine.script = CALL
            first = session.append("find a", return_output_ids=True)
            assert first.finish_reason == "tool_calls"
            assert first.output_ids
            (call,) = first.tool_calls
            assert (call.name, call.parsed()) == ("search", {"q": "a"})
            engine.script = None
            second = session.append(call.result("here"), expected_version=first.version)
            assert second.version == 2
            assert second.usage.computed_tokens == second.usage.delta_tokens
            assert session.get()["version"] == 2
            assert [each["id"] for each in client.sessions()] == [session.id]
            assert client.tree(session)["session_id"] == session.id
        assert client.sessions() == []
        session.close()

    async with served(engine) as url:
        await in_thread(url, work)
    assert "<tool_response>\nhere\n</tool_response>" in engine.tokenizer.decode(engine.prompts[1])


async def test_a_stream_gives_text_and_then_the_turn() -> None:
    engine = EngineDouble()

    def work(client: frontend.Client) -> None:
        session = client.open()
        stream = session.append("hello", stream=True)
        pieces = list(stream)
        assert "".join(pieces) == stream.turn.text
        assert stream.turn.version == 1
        assert session.append("again", stream=True).read().version == 2

    async with served(engine) as url:
        await in_thread(url, work)


async def test_leaving_a_stream_aborts_the_turn() -> None:
    engine = EngineDouble()
    engine.script, engine.pause_after = "a long answer", 3

    def work(client: frontend.Client) -> str:
        session = client.open()
        for _ in session.append("hello", stream=True):
            break
        return session.id

    async with served(engine) as url:
        session_id = await in_thread(url, work)
        while not engine.aborted:
            await asyncio.sleep(0.01)
        engine.pause_after = None
        turn = await in_thread(url, lambda client: client.session(session_id).append("hello"))
        assert turn.version == 1


async def test_the_asynchronous_client_does_the_same() -> None:
    engine = EngineDouble()
    async with async_client(engine) as client, await client.open(system="S") as session:
        assert (await session.append("one")).version == 1
        stream = await session.append("two", stream=True)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == stream.turn.text
        assert (await session.get())["version"] == 2
        assert len(await client.sessions()) == 1
        assert (await client.tree(session))["session_id"] == session.id


async def test_errors_are_typed() -> None:
    engine = EngineDouble(context_length=100)
    async with async_client(engine, max_sessions=1) as client:
        session = await client.open()
        with pytest.raises(frontend.VersionMismatchError) as stale:
            await session.append("x", expected_version=4)
        assert (stale.value.version, stale.value.status) == (0, 409)
        with pytest.raises(frontend.ContextLengthError) as full:
            await session.append(text="x" * 500)
        assert full.value.tokens_left == 99
        with pytest.raises(frontend.InvalidRequestError) as bad:
            await session.append("x", sampling={"top_p": 7}, stream=True)
        assert bad.value.param == "sampling.top_p"
        engine.pause_after = 1
        running = asyncio.create_task(session.append("x"))
        await engine.paused.wait()
        with pytest.raises(frontend.SessionBusyError):
            await session.append("y", on_busy="fail")
        with pytest.raises(frontend.OverloadedError):
            await client.open()
        await session.close()
        with pytest.raises(frontend.SessionClosedError):
            await running
        with pytest.raises(frontend.SessionNotFoundError):
            await session.get()


async def test_an_error_within_a_stream_is_raised_while_reading_it() -> None:
    engine = EngineDouble()
    engine.end_with = {"type": "abort", "message": "no memory", "status_code": 503}
    async with async_client(engine) as client:
        stream = await (await client.open()).append("x", stream=True)
        with pytest.raises(frontend.OverloadedError, match="no memory"):
            await stream.read()


async def test_a_stream_that_is_cut_is_an_error() -> None:
    def cut(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200,
            headers={"content-type": "text/event-stream"},
            content=b'event: delta\ndata: {"text": "x"}\n\n',
        )

    client = frontend.Client("http://test", transport=httpx.MockTransport(cut), max_retries=0)
    with pytest.raises(frontend.ServerError, match="ended before"):
        client.session("id").append("x", stream=True).read()


async def test_an_error_page_of_somebody_else_is_an_error_too() -> None:
    def page(_: httpx.Request) -> httpx.Response:
        return httpx.Response(502, text="<html>bad gateway</html>")

    client = frontend.Client("http://test", transport=httpx.MockTransport(page), max_retries=0)
    with pytest.raises(frontend.ServerError, match="bad gateway"):
        client.open()


@pytest.mark.parametrize("kind", STATUS)
def test_every_kind_of_error_has_a_type_that_is_exported(kind: str) -> None:
    error = error_of(STATUS[kind], {"error": {"type": kind, "message": "m"}})
    assert type(error) is not frontend.ApiError
    assert (error.status, error.type) == (STATUS[kind], kind)


def test_every_type_of_error_is_exported() -> None:
    types_ = {name for name in vars(client_errors) if name.endswith("Error")}
    assert types_ <= set(frontend.__all__)


_REPLY = {
    "id": "s",
    "version": 1,
    "text": "",
    "message": {"role": "assistant", "content": ""},
    "finish_reason": "stop",
    "usage": dict.fromkeys(
        ("history_tokens", "delta_tokens", "cached_tokens", "computed_tokens", "generated_tokens"),
        0,
    )
    | {"accepted_per_step": None, "ttft_ms": 0.0, "total_ms": 0.0},
}


@given(st.lists(st.text(min_size=1, max_size=20), max_size=5), st.integers(1, 9))
def test_a_stream_says_the_same_however_it_is_cut(texts: list[str], size: int) -> None:
    events = [("delta", {"text": text}) for text in texts] + [("done", _REPLY)]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events).encode()

    def cut(_: httpx.Request) -> httpx.Response:
        pieces = (body[at : at + size] for at in range(0, len(body), size))
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=pieces)

    client = frontend.Client("http://test", transport=httpx.MockTransport(cut), max_retries=0)
    stream = client.session("s").append("x", stream=True)
    assert list(stream) == texts
    assert stream.turn.version == 1


def test_both_clients_take_the_same_options() -> None:
    """They are declared once; a client that named its own would drift."""
    for one, other in (
        (frontend.Client, frontend.AsyncClient),
        (frontend.Session, frontend.AsyncSession),
    ):
        names = public(one)
        assert names == public(other)
        for name in names:
            ours, theirs = (inspect.signature(getattr(each, name)) for each in (one, other))
            assert list(ours.parameters) == list(theirs.parameters), name
            hints = [typing.get_type_hints(getattr(each, name)) for each in (one, other)]
            assert hints[0].get("options") == hints[1].get("options"), name


def public(kind: type) -> set[str]:
    return {name for name, each in vars(kind).items() if name[0] != "_" and callable(each)}


@pytest.mark.parametrize(
    ("options", "others", "body"),
    [
        (types.OpenOptions, set(), schemas.OpenBody),
        (types.AppendOptions, {"messages", "stream"}, schemas.AppendBody),
        (types.GenerateOptions, {"stream"}, schemas.GenerateBody),
        (types.ForkOptions, {"version"}, changes.ForkBody),
        (types.KeptOptions, set(), changes.TouchBody),
        (types.WriteOptions, {"messages"}, changes.IngestBody),
        (types.WriteOptions, {"version"}, changes.RollbackBody),
        (types.WriteOptions, {"after", "through", "messages"}, changes.EditBody),
    ],
)
def test_the_options_are_the_fields_of_the_body(options: type, others: set[str], body: Any) -> None:
    assert set(options.__annotations__) | others == set(body.model_fields)
