"""Connections that last, on a real HTTP server: turns waited for, joined, read and left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from engine_double import EngineDouble
from httpx_sse import EventSource
from session_server import app_of, served, service_of

from stateful_sglang.api import streaming

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "hello"}
LONG = "a long answer"


class Rig:
    """A server whose turns stop after three tokens until they are let go."""

    def __init__(self, engine: EngineDouble, url: str) -> None:
        self.engine, self.url = engine, url
        self.http = httpx.AsyncClient(base_url=url, timeout=60)
        self._clients: dict[asyncio.Task[httpx.Response], httpx.AsyncClient] = {}

    async def open(self) -> str:
        return (await self.http.post("/v1/sessions", json={})).json()["id"]

    def send(self, session: str, **fields: Any) -> asyncio.Task[httpx.Response]:
        """An append on a connection of its own, which `leave` breaks."""
        client = httpx.AsyncClient(base_url=self.url, timeout=60)
        path = f"/v1/sessions/{session}/append"
        task = asyncio.create_task(client.post(path, json={"messages": [USER], **fields}))
        self._clients[task] = client
        return task

    async def leave(self, task: asyncio.Task[httpx.Response]) -> None:
        task.cancel()
        await self._clients.pop(task).aclose()

    async def view(self, session: str) -> dict[str, Any]:
        return (await self.http.get(f"/v1/sessions/{session}")).json()

    async def running(self) -> None:
        """Until a turn has come to its stop."""
        await self.engine.paused.wait()
        self.engine.paused.clear()

    def hold(self) -> None:
        self.engine.script, self.engine.pause_after = LONG, 3

    def let_go(self) -> None:
        self.engine.pause_after = None
        self.engine.go.set()

    async def close(self) -> None:
        for client in [self.http, *self._clients.values()]:
            await client.aclose()


@asynccontextmanager
async def rig_of() -> AsyncIterator[Rig]:
    engine = EngineDouble()
    service = service_of(engine)
    async with served(engine, app_of(engine, service=service)) as url:
        rig = Rig(engine, url)
        rig.hold()
        try:
            yield rig
        finally:
            rig.let_go()
            await rig.close()


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n", 1) for block in text.split("\n\n") if block]
    return [(name[7:], json.loads(data[6:])) for name, data in blocks]


async def test_a_second_append_waits_for_the_first() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        first = rig.send(session)
        await rig.running()
        second = rig.send(session, expected_version=1)
        await asyncio.sleep(0.05)
        assert len(rig.engine.requests) == 1
        rig.let_go()
        assert (await first).json()["version"] == 1
        assert (await second).json()["version"] == 2


async def test_who_leaves_while_waiting_takes_no_turn_and_aborts_none() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        first = rig.send(session)
        await rig.running()
        leaving, staying = rig.send(session), rig.send(session, stream=True)
        await asyncio.sleep(0.05)
        await rig.leave(leaving)
        await asyncio.sleep(0.05)
        rig.let_go()
        assert (await first).json()["version"] == 1
        assert events_of((await staying).text)[-1][1]["version"] == 2
        assert (len(rig.engine.requests), rig.engine.aborted) == (2, [])


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_left_makes_the_next_append_no_conflict(stream: bool) -> None:
    async with rig_of() as rig:
        session = await rig.open()
        for version in range(1, 6):
            rig.hold()
            left = rig.send(session, stream=stream)
            await rig.running()
            await rig.leave(left)
            rig.engine.pause_after = None
            assert (await rig.send(session)).json()["version"] == version


async def test_a_detached_turn_commits_without_its_client() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        left = rig.send(session, detach=True, idempotency_key="k")
        await rig.running()
        await rig.leave(left)
        busy = await rig.send(session, on_busy="fail")
        assert busy.json()["error"]["type"] == "session_busy"
        rig.let_go()
        found = await rig.send(session, idempotency_key="k")
        assert (found.json()["version"], found.json()["text"]) == (1, LONG)
        assert len(rig.engine.requests) == 1


async def test_a_joined_stream_is_told_from_its_start_and_outlives_the_first_reader() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        first = rig.send(session, idempotency_key="k", stream=True)
        await rig.running()
        joined = rig.send(session, idempotency_key="k", stream=True)
        whole = rig.send(session, idempotency_key="k")
        await asyncio.sleep(0.05)
        await rig.leave(first)
        await asyncio.sleep(0.05)
        rig.let_go()
        *deltas, (last, turn) = events_of((await joined).text)
        assert "".join(data["text"] for _, data in deltas) == LONG
        assert (last, turn) == ("done", (await whole).json())
        assert (len(rig.engine.requests), rig.engine.aborted) == (1, [])


async def test_a_turn_ends_when_its_last_reader_has_left() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        readers = [rig.send(session, idempotency_key="k", stream=each) for each in (True, False)]
        await rig.running()
        await asyncio.sleep(0.05)
        for reader in readers:
            assert rig.engine.aborted == []
            await rig.leave(reader)
        await until(lambda: rig.engine.aborted)
        rig.engine.pause_after = None
        # Nothing was kept under the key: it is tried again.
        again = await rig.send(session, idempotency_key="k")
        assert (again.json()["version"], len(rig.engine.requests)) == (1, 2)


async def test_an_ephemeral_turn_and_reads_pass_one_that_runs() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        first = rig.send(session)
        await rig.running()
        rig.engine.pause_after = None
        title = await rig.send(session, ephemeral=True)
        assert title.json()["text"] == LONG
        fork = await rig.http.post(f"/v1/sessions/{session}/fork", json={})
        assert fork.status_code == httpx.codes.CREATED
        assert (await rig.view(session))["busy"]
        rig.engine.go.set()
        assert (await first).json()["version"] == 1


async def test_events_tell_what_happens_until_the_session_ends() -> None:
    async with rig_of() as rig:
        rig.let_go()
        session = await rig.open()
        path = f"/v1/sessions/{session}"
        seen: list[tuple[str, Any]] = []
        listening = asyncio.Event()

        async def listen() -> None:
            async with rig.http.stream("GET", f"{path}/events") as response:
                async for event in EventSource(response).aiter_sse():
                    seen.append((event.event, event.json()))
                    listening.set()

        listener = asyncio.create_task(listen())
        await listening.wait()
        await rig.send(session)
        rig.engine.end_with = {"type": "abort", "message": "m", "status_code": None}
        await rig.send(session)
        rig.engine.end_with = None
        for operation, body in (
            ("ingest", {"messages": [USER]}),
            ("fork", {"version": 1}),
            ("rollback", {"version": 1}),
            ("edit", {"after": 0}),
            ("touch", {}),
        ):
            assert (await rig.http.post(f"{path}/{operation}", json=body)).is_success
        await rig.http.delete(path)
        await listener
        assert [(name, data.get("version")) for name, data in seen] == [
            ("listening", 0),
            ("turn.started", 0),
            ("turn.committed", 1),
            ("turn.started", 1),
            ("turn.failed", 1),
            ("ingested", 2),
            ("forked", 1),
            ("rolled_back", 1),
            ("edited", 3),
            ("touched", 3),
            ("closed", 3),
        ]


async def test_a_listener_that_leaves_is_forgotten_and_one_that_hears_nothing_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.01)
    engine = EngineDouble()
    service = service_of(engine)
    async with served(engine, app_of(engine, service=service)) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            session = (await http.post("/v1/sessions", json={})).json()["id"]
            async with http.stream("GET", f"/v1/sessions/{session}/events") as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                lines = response.aiter_lines()
                while not (await anext(lines)).startswith(":"):
                    pass
                assert len(service._core.events) == 1
        await until(lambda: len(service._core.events) == 0)


async def test_events_of_no_session_are_404_before_a_stream_starts() -> None:
    async with rig_of() as rig:
        answer = await rig.http.get("/v1/sessions/nope/events")
        assert answer.json()["error"]["type"] == "session_not_found"
