"""The guard in front of an application like SGLang's: who comes through, and as whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from stateful_sglang import tenants
from stateful_sglang.api import guard
from stateful_sglang.api.guard.sites import Sites
from stateful_sglang.tenants import Keys, keys_file

OWN_KEY = "the server's own"
FOREIGN = {"origin": "https://evil.example"}


def application() -> FastAPI:
    """Routes of every kind behind the middleware that SGLang's application has."""
    app = FastAPI()
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )

    async def who(request: Request) -> dict[str, Any]:
        caller = tenants.current()
        assert request.state.caller is caller
        return {"tenant": caller.tenant, "admin": caller.admin, "salted": caller.salt is not None}

    async def seen(request: Request) -> dict[str, str]:
        return dict(request.headers)

    async def size(request: Request) -> int:
        return len(await request.body())

    async def stream() -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            for _ in range(2):
                await asyncio.sleep(0)
                yield tenants.current().tenant + " "

        return StreamingResponse(words())

    for path in ("/health", "/v1/sessions", "/v1/sessions/{id}", "/flush_cache", "/metrics"):
        app.add_api_route(path, who, methods=["GET"])
    app.add_api_route("/generate", size, methods=["POST"])
    app.add_api_route("/model_info", seen, methods=["GET"])
    app.add_api_route("/v1/models", stream, methods=["GET"])

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(tenants.current().tenant)
        await socket.close()

    return app


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def client(
    path: Path | None = None, *, origins: tuple[str, ...] = (), app: FastAPI | None = None
) -> TestClient:
    app = app or application()
    keys = None if path is None else Keys(path)
    guard.attach(app, sites=Sites("127.0.0.1", origins=origins), keys=keys, own_key=OWN_KEY)
    return TestClient(app, base_url="http://127.0.0.1:30000")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error(reply: httpx.Response) -> tuple[int, str]:
    body = reply.json()
    assert body["type"] == "error"
    assert body["error"]["code"] == reply.status_code
    return reply.status_code, body["error"]["type"]


def test_without_keys_everybody_is_one_tenant_without_a_salt(path: Path) -> None:
    for server in (client(), client(path)):
        for route in ("/v1/sessions", "/flush_cache", "/health"):
            reply = server.get(route)
            assert reply.json() == {"tenant": "default", "admin": True, "salted": False}


def test_a_key_says_who_asks_in_either_header(path: Path) -> None:
    _, key = keys_file.add(path, "acme")
    server = client(path)
    acme = {"tenant": "acme", "admin": False, "salted": True}
    for headers in (
        bearer(key),
        {"authorization": f"bearer  {key}"},
        {"x-api-key": key},
        {"authorization": "Basic eDp5", "x-api-key": key},
    ):
        assert server.get("/v1/sessions", headers=headers).json() == acme


def test_no_key_and_a_wrong_one_are_401_and_say_how_to_send_one(path: Path) -> None:
    keys_file.add(path, "acme")
    server = client(path)
    for headers in ({}, bearer("x"), bearer(""), {"x-api-key": "ä"}):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        reply = server.get("/v1/sessions", headers=raw)
        assert error(reply) == (401, "unauthorized")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer" in reply.json()["error"]["message"]


def test_routes_that_nobody_listed_want_an_administrator(path: Path) -> None:
    _, plain = keys_file.add(path, "acme")
    _, admin = keys_file.add(path, "ops", admin=True)
    server = client(path)
    for route in ("/flush_cache", "/metrics", "/docs", "/no/such/route", "/v1/sessionsx"):
        assert error(server.get(route)) == (401, "unauthorized")
        assert error(server.get(route, headers=bearer(plain))) == (403, "forbidden")
    assert server.get("/flush_cache", headers=bearer(admin)).json()["tenant"] == "ops"
    assert server.get("/no/such/route", headers=bearer(admin)).status_code == 404


@pytest.mark.parametrize(
    "route", ["/v1/sessions/../../flush_cache", "//flush_cache", "/flush_cache/", "/FLUSH_CACHE"]
)
def test_no_spelling_of_a_path_gets_round_it(path: Path, route: str) -> None:
    _, plain = keys_file.add(path, "acme")
    app = application()
    reached: list[str] = []
    app.add_api_route("/flush_cache", lambda: reached.append("x"), methods=["POST"])
    server = client(path, app=app)
    raw = httpx.URL(server.base_url).copy_with(raw_path=route.encode())
    for method in ("GET", "POST"):
        reply = server.request(method, raw, headers=bearer(plain))
        assert reply.status_code in (403, 404, 405)
    assert reached == []


def test_load_balancers_need_no_key(path: Path) -> None:
    keys_file.add(path, "acme")
    assert client(path).get("/health").json() == {"tenant": "", "admin": False, "salted": False}


def test_the_servers_own_requests_pass_whether_keys_exist_or_not(path: Path) -> None:
    own = {"x-api-key": OWN_KEY}
    assert client(path).get("/flush_cache", headers=own).json()["admin"]
    keys_file.add(path, "acme")
    assert client(path).get("/flush_cache", headers=own).json()["admin"]


def test_no_key_goes_further_than_the_guard(path: Path) -> None:
    _, key = keys_file.add(path, "acme")
    both = {**bearer(key), "x-api-key": key}
    seen = client(path).get("/model_info", headers=both).json()
    assert key not in str(seen)
    assert not {"authorization", "x-api-key"} & seen.keys()


def test_without_keys_of_ours_sglangs_own_reach_it() -> None:
    assert client().get("/model_info", headers=bearer("x")).json()["authorization"] == "Bearer x"


def test_a_stream_knows_to_its_end_who_asked(path: Path) -> None:
    _, key = keys_file.add(path, "acme")
    assert client(path).get("/v1/models", headers=bearer(key)).text == "acme acme "


def test_keys_that_come_and_go_count_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateful_sglang.tenants.keys.CHECK_EVERY_S", 0.0)
    server = client(path)
    assert server.get("/v1/sessions").status_code == 200
    made, key = keys_file.add(path, "acme")
    assert server.get("/v1/sessions").status_code == 401
    assert server.get("/v1/sessions", headers=bearer(key)).status_code == 200
    keys_file.revoke(path, made.id)
    assert server.get("/v1/sessions", headers=bearer(key)).status_code == 401


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("route", ["/v1/sessions", "/health", "/generate", "/openapi.json", "/x"])
def test_a_page_of_another_origin_is_refused_on_every_route(method: str, route: str) -> None:
    asked = {**FOREIGN, "access-control-request-method": "POST"}
    reply = client().request(method, route, headers=asked)
    assert reply.status_code == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_page_of_the_server_itself_comes_through_without_leave_for_others() -> None:
    reply = client().get("/v1/sessions", headers={"origin": "http://127.0.0.1:30000"})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_page_that_is_allowed_may_read_the_answer_and_no_other_may() -> None:
    origin = "https://app.example"
    server = client(origins=(origin,))
    reply = server.get("/v1/sessions", headers={"origin": origin})
    assert reply.headers["access-control-allow-origin"] == origin
    assert "Origin" in reply.headers["vary"]
    assert "access-control-allow-credentials" not in reply.headers
    assert server.get("/v1/sessions", headers=FOREIGN).status_code == 403


def test_an_allowed_page_reads_refusals_too_and_asks_first_without_a_key(path: Path) -> None:
    keys_file.add(path, "acme")
    origin = "https://app.example"
    server = client(path, origins=(origin,))
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
        "access-control-request-private-network": "true",
    }
    reply = server.options("/v1/sessions", headers=asked)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == origin
    assert reply.headers["access-control-allow-methods"] == "POST"
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert reply.headers["access-control-allow-private-network"] == "true"
    refused = server.get("/v1/sessions", headers={"origin": origin})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin


def test_a_foreign_name_is_refused_with_what_to_do() -> None:
    reply = client().get("/v1/sessions", headers={"host": "evil.example"})
    assert error(reply) == (421, "misdirected_request")
    assert "--allow-host" in reply.json()["error"]["message"]


def test_a_request_with_two_names_is_refused() -> None:
    hosts = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert client().get("/v1/sessions", headers=hosts).status_code == 421


def test_websockets_are_guarded_alike(path: Path) -> None:
    _, key = keys_file.add(path, "acme")
    server = client(path)
    good = {"host": "127.0.0.1:30000", **bearer(key)}
    with server.websocket_connect("/v1/realtime", headers=good) as socket:
        assert socket.receive_text() == "acme"
    for headers, status in (
        ({"host": "127.0.0.1"}, 401),
        ({**good, **FOREIGN}, 403),
        ({**good, "host": "evil.example"}, 421),
    ):
        with (
            pytest.raises(WebSocketDenialResponse) as refused,
            server.websocket_connect("/v1/realtime", headers=headers),
        ):
            pass
        assert refused.value.status_code == status


@pytest.mark.anyio
async def test_a_websocket_is_closed_where_the_server_can_say_no_more() -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "websocket", "scheme": "ws", "path": "/v1/realtime"}
    headers = [(b"host", b"evil.example")]
    guarded = guard.Guard(application(), Sites("127.0.0.1"))
    await guarded({**scope, "headers": headers}, lambda: None, send)
    assert said == [{"type": "websocket.close", "code": 1008, "reason": "misdirected_request"}]


def test_middleware_that_comes_later_stands_inside(path: Path) -> None:
    """SGLang adds its own at launch, when the application has all of ours."""
    keys_file.add(path, "acme")
    app = application()
    server = client(path, app=app)
    reached: list[str] = []

    class Late:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope["path"])
            await self.inner(scope, receive, send)

    app.add_middleware(Late)
    assert server.get("/v1/sessions").status_code == 401
    assert server.get("/health").status_code == 200
    assert reached == ["/health"]


def test_a_mounted_server_judges_the_route_and_not_the_prefix(path: Path) -> None:
    _, key = keys_file.add(path, "acme")
    app = application()
    guard.attach(app, sites=Sites("127.0.0.1"), keys=Keys(path))
    server = TestClient(app, base_url="http://127.0.0.1", root_path="/llm")
    assert server.get("/llm/v1/sessions", headers=bearer(key)).status_code == 200
    assert server.get("/llm/flush_cache", headers=bearer(key)).status_code == 403
    assert server.get("/llm/health").status_code == 200


@pytest.fixture
def small(path: Path) -> dict[str, str]:
    """Headers of a tenant that may have two requests and a hundred bytes in flight."""
    _, key = keys_file.add(path, "acme")
    keys_file.limit(path, "acme", {"requests": 2, "pending_bytes": 100})
    return bearer(key)


def test_a_body_within_the_limit_comes_through_however_it_is_sent(
    path: Path, small: dict[str, str]
) -> None:
    server = client(path)
    assert server.post("/generate", content=b"x" * 100, headers=small).json() == 100
    assert server.post("/generate", content=iter([b"x" * 50] * 2), headers=small).json() == 100
    assert server.post("/generate", content=b"x" * 100, headers=small).json() == 100


@pytest.mark.parametrize("content", [b"x" * 101, [b"x" * 50] * 3])
def test_a_body_that_never_fits_is_413(path: Path, small: dict[str, str], content: Any) -> None:
    server = client(path)
    sent = content if isinstance(content, bytes) else iter(content)
    assert error(server.post("/generate", content=sent, headers=small)) == (413, "body_too_large")
    assert server.post("/generate", content=b"x", headers=small).json() == 1


@pytest.mark.anyio
async def test_requests_beyond_the_limit_are_429_until_one_ends(
    path: Path, small: dict[str, str]
) -> None:
    app = application()
    gate = asyncio.Event()

    async def wait() -> str:
        await gate.wait()
        return "done"

    app.add_api_route("/encode", wait, methods=["POST"])
    guard.attach(app, sites=Sites("127.0.0.1"), keys=Keys(path))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as server:
        running = [
            asyncio.create_task(server.post("/encode", content=b"x", headers=small)) for _ in "ab"
        ]
        for _ in range(20):
            await asyncio.sleep(0)
        refused = await server.get("/v1/sessions", headers=small)
        assert error(refused) == (429, "too_many_requests")
        assert refused.headers["retry-after"] == "1"
        gate.set()
        assert [(await each).status_code for each in running] == [200, 200]
        assert (await server.get("/v1/sessions", headers=small)).status_code == 200


def test_a_request_that_fails_counts_no_longer(path: Path, small: dict[str, str]) -> None:
    app = application()

    def fail() -> None:
        raise RuntimeError

    app.add_api_route("/encode", fail, methods=["POST"])
    guard.attach(app, sites=Sites("127.0.0.1"), keys=Keys(path))
    server = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    statuses = [
        server.post("/encode", content=body, headers=small).status_code
        for body in (b"x" * 60, b"x" * 60, iter([b"x" * 60]), iter([b"x" * 60]), b"x" * 100)
    ]
    assert statuses == [500] * 5
