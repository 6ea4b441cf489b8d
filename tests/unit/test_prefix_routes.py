"""Publishing over HTTP: what becomes of a body, what is listed, what is refused."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from engine_double import EngineDouble
from session_server import app_of, service_of

from stateful_sglang.api.guard.routes import Access, access

pytestmark = pytest.mark.anyio

SYSTEM = "You are a careful assistant."


@pytest.fixture
def engine() -> EngineDouble:
    return EngineDouble()


@pytest.fixture
async def http(engine: EngineDouble) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def rendered(engine: EngineDouble, said: str) -> list[int]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]
    text = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return engine.tokenizer.encode(text)


async def test_a_system_prompt_is_published_up_to_the_first_word_of_a_user(
    engine: EngineDouble, http: httpx.AsyncClient
) -> None:
    reply = await http.post("/v1/prefixes", json={"system": SYSTEM})
    assert reply.status_code == 201
    (tokens,) = engine.published.values()
    for said in ("Hello", "\n\nhello", "42"):
        assert rendered(engine, said)[: len(tokens)] == tokens
    assert engine.tokenizer.decode(tokens).endswith("<|im_start|>user\n")
    created_at = reply.json()["created_at"]
    assert abs(created_at - time.time()) < 60
    assert reply.json() == {
        "id": next(iter(engine.published)),
        "name": None,
        "state": "published",
        "problem": None,
        "tokens": len(tokens),
        "aligned_tokens": len(tokens) // 16 * 16,
        "created_at": created_at,
    }


@pytest.mark.parametrize(
    ("body", "tokens"), [({"input_ids": [5, 6, 7]}, [5, 6, 7]), ({"text": "ab"}, [100, 101])]
)
async def test_raw_prefixes_are_published_as_they_are(
    engine: EngineDouble, http: httpx.AsyncClient, body: Any, tokens: list[int]
) -> None:
    assert (await http.post("/v1/prefixes", json=body)).status_code == 201
    assert list(engine.published.values()) == [tokens]


async def test_what_is_published_is_listed_once_until_it_is_removed(
    engine: EngineDouble, http: httpx.AsyncClient
) -> None:
    first = (await http.post("/v1/prefixes", json={"text": "ab"})).json()
    second = (await http.post("/v1/prefixes", json={"text": "cd"})).json()
    assert (await http.post("/v1/prefixes", json={"text": "ab"})).json() == first
    assert (await http.get("/v1/prefixes")).json() == {"prefixes": [first, second]}
    assert (await http.delete(f"/v1/prefixes/{first['id']}")).json() == first
    assert (await http.get("/v1/prefixes")).json() == {"prefixes": [second]}
    assert list(engine.published) == [second["id"]]
    gone = await http.delete(f"/v1/prefixes/{first['id']}")
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "prefix_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "system"),
        ({"text": "a", "input_ids": [1]}, "system"),
        ({"system": "a", "text": "a"}, "system"),
        ({"text": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"system": "a", "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs"),
        ({"input_ids": [1, 5000]}, "input_ids[1]"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"messages": []}, "messages"),
        ({"text": "a", "name": ""}, "name"),
        ({"text": "a", "name": "n" * 257}, "name"),
    ],
)
async def test_a_bad_body_is_refused_by_its_field(
    engine: EngineDouble, http: httpx.AsyncClient, body: Any, param: str
) -> None:
    reply = await http.post("/v1/prefixes", json=body)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == param
    assert engine.published == {}


async def test_a_prefix_longer_than_the_context_is_refused(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/prefixes", json={"input_ids": [5] * 5000})
    assert (reply.status_code, reply.json()["error"]["tokens_left"]) == (413, 4095)


async def test_what_the_ranks_refuse_is_told_and_not_listed(
    engine: EngineDouble, http: httpx.AsyncClient
) -> None:
    engine.refuse_prefixes = "it takes too much"
    reply = await http.post("/v1/prefixes", json={"text": "ab"})
    assert reply.status_code == 409
    assert reply.json()["error"] == {
        "type": "publish_refused",
        "message": "the prefix can't be published: it takes too much",
    }
    assert (await http.get("/v1/prefixes")).json() == {"prefixes": []}


async def test_an_engine_that_does_not_answer_publishes_nothing(
    engine: EngineDouble, http: httpx.AsyncClient
) -> None:
    engine.silent = True
    assert (await http.post("/v1/prefixes", json={"text": "ab"})).status_code == 503
    assert (await http.get("/v1/prefixes")).json() == {"prefixes": []}


async def test_a_server_that_stops_publishes_nothing(engine: EngineDouble) -> None:
    service = service_of(engine)
    service.begin_drain()
    transport = httpx.ASGITransport(app_of(engine, service=service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/v1/prefixes", json={"text": "ab"})).status_code == 503


@pytest.mark.parametrize("path", ["/v1/prefixes", "/v1/prefixes/x"])
def test_the_routes_are_for_administrators(path: str) -> None:
    assert access(path) is Access.ADMIN
