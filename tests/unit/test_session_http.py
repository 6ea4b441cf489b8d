"""The session routes over HTTP: forms, statuses, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from engine_double import EngineDouble
from session_server import app_of, served

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "hello"}


@asynccontextmanager
async def client_of(engine: EngineDouble, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client without sockets."""
    transport = httpx.ASGITransport(app_of(engine, **limits))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def open_one(client: httpx.AsyncClient, **fields: Any) -> str:
    response = await client.post("/v1/sessions", json=fields)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_a_session_from_open_to_close() -> None:
    engine = EngineDouble()
    async with client_of(engine) as client:
        session = await open_one(client, system="S", metadata={"who": "me"})
        reply = (
            await client.post(f"/v1/sessions/{session}/append", json={"messages": [USER]})
        ).json()
        assert reply["id"] == session
        assert reply["version"] == 1
        assert reply["message"] == {"role": "assistant", "content": reply["text"]}
        assert reply["finish_reason"] == "stop"
        assert set(reply["usage"]) >= {
            "history_tokens",
            "delta_tokens",
            "cached_tokens",
            "computed_tokens",
            "generated_tokens",
            "accepted_per_step",
            "ttft_ms",
            "total_ms",
        }
        assert 0 < reply["usage"]["ttft_ms"] <= reply["usage"]["total_ms"]
        view = (await client.get(f"/v1/sessions/{session}")).json()
        assert (view["version"], view["metadata"]) == (1, {"who": "me"})
        listed = (await client.get("/v1/sessions")).json()
        assert [each["id"] for each in listed["sessions"]] == [session]
        tree = (await client.get("/v1/tree", params={"session_id": session, "limit": 5})).json()
        assert (tree["session_id"], tree["limit"]) == (session, 5)
        closed = await client.delete(f"/v1/sessions/{session}")
        assert closed.json() == {
            "id": session,
            "version": 1,
            "closed": True,
            "erased": False,
        }
        assert (await client.get(f"/v1/sessions/{session}")).status_code == 404


async def test_a_tree_that_is_not_described_in_time_is_an_error_in_our_form() -> None:
    engine = EngineDouble()
    engine.silent = True
    async with client_of(engine) as client:
        late = await client.get("/v1/tree")
        assert (late.status_code, late.json()["error"]["type"]) == (503, "engine_unavailable")
        assert "Retry-After" in late.headers
        wide = await client.get("/v1/tree", params={"limit": 1001})
        assert (wide.status_code, wide.json()["error"]["param"]) == (422, "limit")


async def test_a_stream_is_deltas_and_then_the_reply() -> None:
    engine = EngineDouble()
    engine.script = "line\u2028one, 北京"
    engine.vocab_size = 0x110000
    async with client_of(engine) as client:
        session = await open_one(client)
        body = {"messages": [USER], "stream": True}
        response = await client.post(f"/v1/sessions/{session}/append", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *deltas, (last, reply) = events_of(response.text)
        assert {name for name, _ in deltas} == {"delta"}
        assert len(deltas) > 1
        assert last == "done"
        assert "".join(data["text"] for _, data in deltas) == reply["text"] == engine.script
        assert reply["version"] == 1


async def test_an_error_in_a_stream_is_its_last_event() -> None:
    engine = EngineDouble()
    async with client_of(engine) as client:
        session = await open_one(client)
        engine.end_with = {"type": "abort", "message": "no memory", "status_code": 503}
        body = {"messages": [USER], "stream": True}
        response = await client.post(f"/v1/sessions/{session}/append", json=body)
        name, data = events_of(response.text)[-1]
        assert name == "error"
        assert data["error"]["type"] == "engine_unavailable"
        assert data["error"]["status"] == 503
        assert "no memory" in data["error"]["message"]


TEXT = {"text": "x"}
PART = {"type": "text", "text": "x"}
BAD = [
    (b"{", "body"),
    (b"", "body"),
    (b"[]", "body"),
    (b'{"text": "\\ud800"}', "body"),
    ({}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    ({"messages": [{**USER, "audio": {"id": "a"}}]}, "messages[0].audio"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "content": [{**PART, "lang": "en"}]}]}, "messages[0].content[0].lang"),
    ({"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0]"),
    ({"messages": [USER], "text": "x"}, "messages, text"),
    ({"text": ""}, "text"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [1, "2"]}, "input_ids[1]"),
    ({"input_ids": [1, 99999]}, "input_ids[1]"),
    ({"input_ids": [-1]}, "input_ids[0]"),
    ({**TEXT, "unknown": 1}, "unknown"),
    ({**TEXT, "stream": "yes"}, "stream"),
    ({**TEXT, "expected_version": -1}, "expected_version"),
    ({**TEXT, "expected_version": 2**63}, "expected_version"),
    ({**TEXT, "on_busy": "queue"}, "on_busy"),
    ({**TEXT, "wait_s": 601}, "wait_s"),
    ({**TEXT, "wait_s": -1}, "wait_s"),
    ({**TEXT, "wait_s": "10"}, "wait_s"),
    ({**TEXT, "idempotency_key": ""}, "idempotency_key"),
    ({**TEXT, "idempotency_key": "k" * 257}, "idempotency_key"),
    ({**TEXT, "ephemeral": 1}, "ephemeral"),
    ({**TEXT, "detach": "no"}, "detach"),
    ({**TEXT, "tool_choice": "maybe"}, "tool_choice"),
    ({**TEXT, "tool_choice": "required"}, "tool_choice"),
    ({**TEXT, "sampling": []}, "sampling"),
    ({**TEXT, "sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
    ({**TEXT, "sampling": {"max_tokens": "5"}}, "sampling.max_tokens"),
    ({**TEXT, "sampling": {"temperature": -0.1}}, "sampling.temperature"),
    (b'{"text": "x", "sampling": {"temperature": NaN}}', "sampling.temperature"),
    ({**TEXT, "sampling": {"top_p": 0}}, "sampling.top_p"),
    ({**TEXT, "sampling": {"top_k": 0}}, "sampling.top_k"),
    ({**TEXT, "sampling": {"min_p": 2}}, "sampling.min_p"),
    ({**TEXT, "sampling": {"stop": 5}}, "sampling.stop"),
    ({**TEXT, "sampling": {"stop": ["x"] * 99}}, "sampling.stop"),
    ({**TEXT, "sampling": {"stop_token_ids": [99999]}}, "sampling.stop_token_ids[0]"),
    ({**TEXT, "sampling": {"json_schema": "{"}}, "sampling.json_schema"),
    ({**TEXT, "sampling": {"json_schema": {"type": "nothing"}}}, "sampling.json_schema"),
    ({**TEXT, "sampling": {"json_schema": {"$ref": "#"}}}, "sampling.json_schema"),
    ({**TEXT, "stream": True, "sampling": {"json_schema": {"$ref": "#"}}}, "sampling.json_schema"),
    ({**TEXT, "sampling": {"json_schema": {"$ref": "http://x/y"}}}, "sampling.json_schema"),
    (
        b'{"text": "x", "sampling": {"json_schema": {"maximum": 1%s}}}' % (b"0" * 5000),
        "body",
    ),
    (
        {
            **TEXT,
            "sampling": {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"$ref": "#/gone"}},
                }
            },
        },
        "sampling.response_format",
    ),
    ({**TEXT, "sampling": {"regex": "(" * 999}}, "sampling.regex"),
    ({**TEXT, "sampling": {"ebnf": "a" * 99999}}, "sampling.ebnf"),
    ({**TEXT, "sampling": {"regex": "a", "ebnf": "b"}}, "sampling.regex, ebnf"),
    ({**TEXT, "sampling": {"n": 2}}, "sampling.n"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=range(len(BAD)))
async def test_bad_input_is_422_naming_the_field_before_the_engine_sees_it(
    body: Any, param: str
) -> None:
    engine = EngineDouble()
    async with client_of(engine) as client:
        session = await open_one(client)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post(f"/v1/sessions/{session}/append", content=content)
        assert response.status_code == 422, response.text
        error = response.json()["error"]
        assert error["type"] == "invalid_request"
        assert error["param"] == param
        assert error["message"]
        assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"system": ""}, "system"),
        ({"tools": [{"function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a"}}] * 2}, "tools"),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": 5}}}]},
            "tools[0].function.parameters",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "system"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": 1e12}, "ttl_s"),
        ({"retention": "hard"}, "retention"),
        ({"priority": 2**31}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"private": None}, "private"),
        ({"stream": True}, "stream"),
    ],
)
async def test_a_bad_opening_is_422_naming_the_field(body: Any, param: str) -> None:
    async with client_of(EngineDouble()) as client:
        response = await client.post("/v1/sessions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)


async def test_query_values_are_checked_in_the_same_form() -> None:
    async with client_of(EngineDouble()) as client:
        for path in ("/v1/tree?limit=0", "/v1/sessions?limit=many"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]["param"]) == (422, "limit")


async def test_errors_have_their_status_type_and_details() -> None:
    engine = EngineDouble(context_length=100)
    async with client_of(engine, max_sessions=1, max_body_bytes=2000) as client:
        missing = await client.post("/v1/sessions/nope/append", json=TEXT)
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "session_not_found")
        assert (await client.get("/v1/tree?session_id=nope")).status_code == 404
        session = await open_one(client)
        path = f"/v1/sessions/{session}/append"
        full = await client.post(path, json={"text": "x" * 100})
        assert (full.status_code, full.json()["error"]["tokens_left"]) == (413, 99)
        stale = await client.post(path, json={**TEXT, "expected_version": 3})
        assert (stale.status_code, stale.json()["error"]["version"]) == (409, 0)
        large = await client.post(path, json={"text": "x" * 3000})
        assert (large.status_code, large.json()["error"]["max_bytes"]) == (413, 2000)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b" " * 100

        assert (await client.post(path, content=chunks())).status_code == 413
        engine.end_with = {"type": "abort", "message": "m", "status_code": None}
        assert (await client.post(path, json=TEXT)).status_code == 500
        engine.end_with, engine.pause_after = None, 1
        running = asyncio.create_task(client.post(path, json=TEXT))
        await engine.paused.wait()
        many = await client.post("/v1/sessions", json={})
        assert (many.status_code, many.json()["error"]["type"]) == (429, "too_many_sessions")
        assert many.headers["retry-after"]
        engine.go.set()
        await running


async def test_the_applications_own_validation_errors_keep_their_form() -> None:
    app = app_of(EngineDouble())

    @app.get("/own")
    async def own(number: int) -> int:
        return number

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        response = await client.get("/own?number=x")
        assert "detail" in response.json()
        assert "error" not in response.json()


async def test_the_routes_are_documented() -> None:
    async with client_of(EngineDouble()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        body = paths["/v1/sessions/{session_id}/append"]["post"]["requestBody"]
        fields = body["content"]["application/json"]["schema"]["properties"]
        assert {"messages", "text", "input_ids", "sampling"} <= set(fields)
        assert "$ref" not in json.dumps(fields)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_leaves_the_last_committed_version(stream: bool) -> None:
    engine = EngineDouble()
    async with served(engine) as url, httpx.AsyncClient(base_url=url) as other:
        session, twin = await open_one(other), await open_one(other)
        path = f"/v1/sessions/{session}/append"
        for each in (session, twin):
            await other.post(f"/v1/sessions/{each}/append", json={"messages": [USER]})
        engine.script, engine.pause_after = "a long answer", 3
        leaving = httpx.AsyncClient(base_url=url)
        body = {"messages": [USER], "stream": stream}
        request = asyncio.create_task(leaving.post(path, json=body))
        await engine.paused.wait()
        busy = await other.post(path, json={"messages": [USER], "on_busy": "fail"})
        assert (busy.status_code, busy.json()["error"]["version"]) == (409, 1)
        request.cancel()
        await leaving.aclose()
        while not engine.aborted:
            await asyncio.sleep(0.01)
        engine.script, engine.pause_after = None, None
        assert (await other.get(f"/v1/sessions/{session}")).json()["version"] == 1
        texts = [
            (await other.post(f"/v1/sessions/{each}/append", json={"messages": [USER]})).json()
            for each in (session, twin)
        ]
        assert texts[0]["text"] == texts[1]["text"]
        assert texts[0]["version"] == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["regex", "ebnf"])
async def test_what_the_compiler_refuses_is_422_before_a_stream_starts(
    field: str, stream: bool
) -> None:
    engine = EngineDouble()
    engine.refuse_constraints = "the compiler says no"
    async with client_of(engine) as client:
        session = await open_one(client)
        body = {**TEXT, "sampling": {field: "x"}, "stream": stream}
        response = await client.post(f"/v1/sessions/{session}/append", json=body)
        assert response.status_code == 422
        assert response.json()["error"]["param"] == f"sampling.{field}"
        assert "the compiler says no" in response.json()["error"]["message"]
        assert engine.requests == []


async def test_a_tools_schema_is_refused_by_its_place() -> None:
    remote = {"type": "object", "properties": {"a": {"$ref": "https://x.y/z"}}}
    fine = {"type": "function", "function": {"name": "fine", "parameters": None}}
    bad = {"type": "function", "function": {"name": "bad", "parameters": remote}}
    async with client_of(EngineDouble()) as client:
        response = await client.post("/v1/sessions", json={"tools": [fine, bad]})
        assert response.status_code == 422
        assert response.json()["error"]["param"] == "tools[1].function.parameters"


async def test_a_constraint_that_only_the_scheduler_refuses_is_422_by_its_name() -> None:
    engine = EngineDouble()
    message = "Failed to compile regex grammar: too much"
    engine.end_with = {"type": "abort", "message": message, "status_code": 400}
    async with client_of(engine) as client:
        session = await open_one(client)
        body = {**TEXT, "sampling": {"regex": "x"}}
        response = await client.post(f"/v1/sessions/{session}/append", json=body)
        assert response.status_code == 422
        assert response.json()["error"]["param"] == "sampling.regex"
