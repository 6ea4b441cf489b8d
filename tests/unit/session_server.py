"""The session routes over an engine double, as an application and as a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from engine_double import EngineDouble
from failing_journal import FailingJournal
from fastapi import FastAPI

from stateful_sglang.api.native.routes import build_router
from stateful_sglang.service.service import Limits, SessionService


def service_of(
    engine: EngineDouble, journal: FailingJournal | None = None, **limits: Any
) -> SessionService:
    return SessionService(engine, journal or FailingJournal(), Limits(**limits))


def app_of(
    engine: EngineDouble,
    journal: FailingJournal | None = None,
    service: SessionService | None = None,
    **limits: Any,
) -> FastAPI:
    app = FastAPI()
    app.include_router(build_router(service or service_of(engine, journal, **limits)))
    return app


@asynccontextmanager
async def served(engine: EngineDouble, app: FastAPI | None = None) -> AsyncIterator[str]:
    """The address of a real server of `engine`, on a free port."""
    config = uvicorn.Config(app or app_of(engine), port=0, log_level="warning")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await task


@contextmanager
def running() -> Iterator[tuple[str, EngineDouble, FailingJournal]]:
    """A server in a thread of its own, since the command blocks."""
    started, stop = threading.Event(), asyncio.Event()
    engine, journal = EngineDouble(), FailingJournal()
    found: dict[str, Any] = {}

    async def serve() -> None:
        found["loop"] = asyncio.get_running_loop()
        async with served(engine, app_of(engine, journal)) as url:
            found["url"] = url
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        yield found["url"], engine, journal
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join()
