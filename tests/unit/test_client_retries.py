"""A client takes a server that is started again as a delay: it sends the same request again.

The server is scripted, over real connections; pauses are noted and not waited for.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from stateful_sglang import client as frontend
from stateful_sglang.client.retries import Attempts

REPLY = {
    "id": "s",
    "version": 1,
    "text": "one two",
    "message": {"role": "assistant", "content": "one two"},
    "finish_reason": "stop",
    "usage": dict.fromkeys(
        ("history_tokens", "delta_tokens", "cached_tokens", "computed_tokens", "generated_tokens"),
        0,
    )
    | {"accepted_per_step": None, "ttft_ms": 0.0, "total_ms": 0.0},
}

Step = Callable[[BaseHTTPRequestHandler], None]


def answer(status: int, body: Any, **headers: str) -> Step:
    def step(handler: BaseHTTPRequestHandler) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in (("Content-Length", str(len(data))), *headers.items()):
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return step


def refused(status: int = 503, kind: str = "draining", after: str | None = "7") -> Step:
    headers = {} if after is None else {"Retry_After": after}
    return answer(status, {"error": {"type": kind, "message": "later"}}, **headers)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """As a process that is killed: the connection is reset."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def stream(*texts: str, end: str | None = "done", error: Any = None) -> Step:
    """A turn's events; without `end` the connection breaks behind them."""

    def step(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        events = [("delta", {"text": text}) for text in texts]
        if end is not None:
            events.append((end, error or REPLY))
        for name, data in events:
            event = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        if end is None:
            hang_up(handler)
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return step


class Scripted:
    """A server that answers each request with the next step, the last one for ever."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.steps: list[Step] = []
        self.bodies: list[dict[str, Any]] = []

    def keys(self) -> list[Any]:
        return [body.get("idempotency_key") for body in self.bodies]


@pytest.fixture
def server() -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            scripted.bodies.append(json.loads(self.rfile.read(length) or "{}"))
            steps = scripted.steps
            (steps.pop(0) if len(steps) > 1 else steps[0])(self)

        do_GET = do_DELETE = do_POST = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        scripted = Scripted(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield scripted
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for, in seconds."""
    noted: list[float] = []
    pause = Attempts.pause

    def note(self: Attempts, error: Exception) -> float:
        noted.append(pause(self, error))
        return 0

    monkeypatch.setattr(Attempts, "pause", note)
    return noted


Call = Callable[..., Any]


def synchronous(url: str, operation: str, **options: Any) -> Any:
    retries = {name: options.pop(name) for name in ("max_retries",) if name in options}
    with frontend.Client(url, **retries) as client:
        if operation == "stream":
            running = client.session("s").append("hello", stream=True, **options)
            return list(running), running.turn
        if operation == "append":
            return client.session("s").append("hello", **options)
        if operation == "open":
            return client.open(**options).id
        return client.request(*operation.split(), **options)


def asynchronous(url: str, operation: str, **options: Any) -> Any:
    retries = {name: options.pop(name) for name in ("max_retries",) if name in options}

    async def run() -> Any:
        async with frontend.AsyncClient(url, **retries) as client:
            if operation == "stream":
                running = await client.session("s").append("hello", stream=True, **options)
                return [text async for text in running], running.turn
            if operation == "append":
                return await client.session("s").append("hello", **options)
            if operation == "open":
                return (await client.open(**options)).id
            return await client.request(*operation.split(), **options)

    return asyncio.run(run())


@pytest.fixture(params=[synchronous, asynchronous])
def call(request: pytest.FixtureRequest) -> Call:
    return request.param


@pytest.mark.parametrize("operation", ["append", "open"])
def test_a_broken_connection_and_a_drain_are_a_delay(
    operation: str, call: Call, server: Scripted, pauses: list[float]
) -> None:
    server.steps = [hang_up, refused(after="7"), refused(after="7"), answer(200, REPLY)]
    assert call(server.url, operation)
    assert len(set(server.keys())) == 1
    assert len(server.keys()[0]) >= 16
    assert 1.5 <= pauses[0] <= 2.5
    assert pauses[1] == 7  # the server asks for more than the client would wait
    assert 7 <= pauses[2] <= 10


def test_each_request_has_a_key_of_its_own(call: Call, server: Scripted) -> None:
    server.steps = [answer(200, REPLY)]
    call(server.url, "append")
    call(server.url, "append")
    call(server.url, "append", idempotency_key="mine")
    first, second, third = server.keys()
    assert first != second
    assert third == "mine"


def test_retries_are_bounded_and_last_about_a_minute(
    call: Call, server: Scripted, pauses: list[float]
) -> None:
    server.steps = [refused(after="1")]
    with pytest.raises(frontend.OverloadedError) as last:
        call(server.url, "append")
    assert last.value.status == 503
    assert len(server.bodies) == 6
    assert 45 <= sum(pauses) <= 80


def test_a_server_that_nobody_starts_again_is_a_connection_error(
    call: Call, pauses: list[float]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(httpx.ConnectError):
        call(url, "append", max_retries=2)
    assert len(pauses) == 2


@pytest.mark.parametrize(
    "step",
    [
        refused(409, "session_busy"),
        refused(429, "too_many_sessions"),
        refused(500, "engine_error"),
        refused(503, "engine_unavailable", after=None),
    ],
)
def test_other_errors_are_the_callers(call: Call, server: Scripted, step: Step) -> None:
    server.steps = [step]
    with pytest.raises(frontend.ApiError):
        call(server.url, "append")
    assert len(server.bodies) == 1


def test_without_retries_nothing_is_added_or_sent_again(call: Call, server: Scripted) -> None:
    server.steps = [refused()]
    with pytest.raises(frontend.OverloadedError):
        call(server.url, "append", max_retries=0)
    assert server.keys() == [None]


def test_reading_is_sent_again_and_what_has_no_key_is_not(call: Call, server: Scripted) -> None:
    server.steps = [hang_up, answer(200, {"a": 1})]
    assert call(server.url, "GET /v1/sessions/s") == {"a": 1}
    server.steps = [hang_up, answer(200, {})]
    with pytest.raises(httpx.TransportError):
        call(server.url, "POST /v1/sessions/s/touch", body={})
    server.steps = [refused(), answer(200, {"b": 1})]  # it has done nothing, it says
    assert call(server.url, "POST /v1/sessions/s/touch", body={}) == {"b": 1}


@pytest.mark.parametrize("broken", [hang_up, refused(), stream(end=None)])
def test_a_stream_that_breaks_before_its_first_event_begins_again(
    broken: Step, call: Call, server: Scripted
) -> None:
    server.steps = [broken, stream("one ", "two")]
    texts, turn = call(server.url, "stream")
    assert texts == ["one ", "two"]
    assert turn.version == 1
    assert len(set(server.keys())) == 1


@pytest.mark.parametrize("again", [("one ", "two"), ("one two",), ("o", "ne t", "wo")])
def test_a_stream_that_breaks_later_goes_on_where_it_was(
    again: tuple[str, ...], call: Call, server: Scripted
) -> None:
    server.steps = [stream("on", "e t", end=None), stream("o", end=None), stream(*again)]
    texts, turn = call(server.url, "stream")
    assert texts[:2] == ["on", "e t"]
    assert "".join(texts) == "one two"
    assert turn.version == 1
    assert len(set(server.keys())) == 1


@pytest.mark.parametrize("again", [("won, too",), ("on",)])
def test_another_answer_than_was_begun_is_an_error_that_names_the_key(
    again: tuple[str, ...], call: Call, server: Scripted
) -> None:
    server.steps = [stream("one ", end=None), stream(*again)]
    with pytest.raises(frontend.StreamDivergedError) as diverged:
        call(server.url, "stream")
    assert diverged.value.idempotency_key == server.keys()[0]
    assert server.keys()[0] in str(diverged.value)


def test_a_turn_that_a_drain_gave_up_is_sent_again(call: Call, server: Scripted) -> None:
    aborted = {"error": {"type": "turn_aborted", "message": "x", "status": 503}}
    server.steps = [stream("one ", end="error", error=aborted), stream("one ", "two")]
    texts, _ = call(server.url, "stream")
    assert texts == ["one ", "two"]


def test_an_error_of_the_turn_itself_ends_the_stream(call: Call, server: Scripted) -> None:
    failed = {"error": {"type": "engine_error", "message": "x", "status": 500}}
    server.steps = [stream("one ", end="error", error=failed)]
    with pytest.raises(frontend.ServerError):
        call(server.url, "stream")
    assert len(server.bodies) == 1


def test_closing_a_session_again_is_no_error(server: Scripted) -> None:
    server.steps = [hang_up, refused(404, "session_not_found", after=None)]
    with frontend.Client(server.url) as client:
        client.session("s").close()
    assert len(server.bodies) == 2
