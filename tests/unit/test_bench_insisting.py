"""The bench of recovery finds what a server has lost, done twice or answered otherwise."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from engine_double import EngineDouble
from session_server import served

from bench.engines.insisting import Played, Player, Tally, script

TEXTS = ["Name three colours. " * 10, "And what of the sea? " * 10]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the engine's double, in a thread of its own."""
    told: list[str] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with served(EngineDouble(context_length=100_000)) as address:
            told.append(address)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield told[0]
    loop.call_soon_threadsafe(over.set)
    thread.join()


class Unreliable(httpx.HTTPTransport):
    """Loses the answer to every fifth change, which the server has made all the same."""

    def __init__(self, change: Callable[[httpx.Request], httpx.Request]) -> None:
        super().__init__()
        self._change = change
        self._count = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = super().handle_request(self._change(request))
        self._count += request.method == "POST"
        if self._count % 5 == 0 and request.method == "POST":
            reply.read()
            raise httpx.RemoteProtocolError("the server is gone")
        return reply


def without_key(request: httpx.Request) -> httpx.Request:
    if not request.content or request.url.path == "/v1/sessions":
        return request
    body = json.loads(request.content)
    body.pop("idempotency_key", None)
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json", "host": request.headers["host"]}
    return httpx.Request(request.method, request.url, content=content, headers=headers)


def play(
    url: str,
    name: str,
    twin: Played | None = None,
    change: Callable[[httpx.Request], httpx.Request] | None = None,
) -> tuple[Played, Tally, Player]:
    tally = Tally()
    player = Player(url, tally, lambda: None)
    if change is not None:
        player._client = httpx.Client(base_url=url, transport=Unreliable(change), timeout=30)
    return player.play(Played(0, script(TEXTS, 1), name), twin), tally, player


def test_a_server_that_keeps_its_word_is_found_to(url: str) -> None:
    twin, *_ = play(url, "sound-twin")
    played, tally, player = play(url, "sound", twin, change=lambda request: request)
    player._client = httpx.Client(base_url=url)
    player.look(played)
    assert played.interrupted
    assert (tally.lost, tally.duplicated, tally.wrong, tally.notes) == (set(), 0, 0, [])


def test_a_turn_that_was_done_twice_is_found(url: str) -> None:
    twin, *_ = play(url, "twice-twin")
    _, tally, _ = play(url, "twice", twin, change=without_key)
    assert tally.duplicated
    assert tally.wrong_after_recovery


def test_another_answer_than_the_twin_s_is_found(url: str) -> None:
    twin, *_ = play(url, "other-twin")
    twin.answers[3] = twin.answers[3]._replace(ids=(1,))
    _, tally, _ = play(url, "other", twin)
    assert (tally.wrong, tally.wrong_after_recovery) == (1, 0)


def test_a_session_that_is_gone_has_lost_its_turns(url: str) -> None:
    played, tally, player = play(url, "gone")
    httpx.delete(f"{url}/v1/sessions/{played.id}").raise_for_status()
    player.look(played)
    assert len(tally.lost) == len(played.said)
