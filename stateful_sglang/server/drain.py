"""The orderly end: running turns get a bounded time, new ones are refused, then the server stops.

SGLang's own end at SIGTERM waits without a bound, goes on taking requests meanwhile and looks at
its flag every five seconds; at SIGINT uvicorn waits without a bound and leaves by the signal. Here
both signals begin the same drain. A second one ends the server at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stateful_sglang.session.errors import DrainingError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2
"""What a refused client is told to wait; a server that is started again takes longer than that."""
ABORT_S = 5.0
"""Longest wait for requests to end once they were aborted."""
FLUSH_S = 15.0
"""Longest wait for what is to be written before the end."""
STOP_S = 30.0
"""Longest wait for the engine's processes and the HTTP server."""
_POLL_S = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_ENDING = frozenset({"/abort_request"})
"""Requests that help to end others are served to the last."""
_HEALTH = frozenset({"/health", "/health_generate", "/ready"})
"""How a load balancer learns that this server takes nothing new."""


class Engine(Protocol):
    """What a drain asks of the model server."""

    def busy(self) -> bool:
        """Whether any request has not ended."""
        ...

    def abort_all(self) -> None:
        """Have every request end soon."""
        ...

    async def stop(self) -> None:
        """End the engine's processes and have the HTTP server return; no request is left."""
        ...

    def kill(self) -> None:
        """End the engine's processes now. Called from a signal handler, or from a thread."""
        ...


class Drain:
    """One server's end. `attach` and `follow` come before the server is started."""

    def __init__(
        self,
        bound_s: float,
        on_begin: Callable[[], Awaitable[None]] | None = None,
        on_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """
        Args:
            bound_s: Seconds that running requests have to end.
            on_begin: Called when the drain begins, new work being refused already.
            on_end: Called when requests have ended or the bound has passed: writes what is left.
        """
        self.on_begin = on_begin
        self.on_end = on_end
        self.draining = False
        """Whether new work is refused."""
        self.status = 0
        """Exit status of the process: 1 where something was not written before the end."""
        self._bound_s = bound_s
        self._engine: Engine | None = None
        self._ready = False
        self._task: asyncio.Task[None] | None = None
        self._working: set[asyncio.Task[Any]] = set()
        self._reading: set[asyncio.Task[Any]] = set()
        self._hanging_up = False
        self._written = False

    def follow(self, engine: Engine) -> None:
        """Learn the engine, once there is one."""
        self._engine = engine

    def ready(self) -> None:
        """Learn that the server answers: before that there is nothing to wait for."""
        self._ready = True

    def attach(self, app: FastAPI) -> None:
        """Watch the application's requests and, while it is served, this process's signals."""
        app.add_middleware(_Guard, drain=self)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(served: Any) -> AsyncIterator[Any]:
            # Here, behind uvicorn's own handlers, which it sets just before.
            loop = asyncio.get_running_loop()
            for number in _SIGNALS:
                loop.add_signal_handler(number, self.begin, number)
            async with inner(served) as state:
                yield state

        app.router.lifespan_context = lifespan

    def begin(self, number: int = signal.SIGTERM) -> None:
        """Begin to drain, for a signal; the next signal ends the process. On the event loop."""
        if self.draining:
            self._end_now(number, None)
        self.draining = True
        loop = asyncio.get_running_loop()
        for each in _SIGNALS:
            # From now on outside the loop, which SGLang blocks while its schedulers end.
            loop.remove_signal_handler(each)
            signal.signal(each, self._end_now)
        if not self._ready:
            # SGLang's warm-up kills the process when it is refused: this comes first.
            logger.info("%s: not ready yet, ends at once", signal.Signals(number).name)
            self._leave(0)
        logger.info(
            "%s: running turns have %g s to end, new ones are refused; a second signal ends the "
            "server at once",
            signal.Signals(number).name,
            self._bound_s,
        )
        longest = self._bound_s + ABORT_S + FLUSH_S + STOP_S
        threading.Thread(target=self._watch, args=(longest,), daemon=True).start()
        self._task = asyncio.create_task(self._run(), name="drain")

    async def guard(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        working = scope["type"] == "websocket" or scope["method"] not in _READING
        if self.draining and _refused(scope, working=working):
            await _refuse(scope, receive, send)
            return
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        served = self._working if working else self._reading
        served.add(task)
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._hanging_up:
                raise
        finally:
            served.discard(task)

    async def _run(self) -> None:
        began = time.monotonic()
        assert self._engine is not None
        await self._call(self.on_begin, self._bound_s)
        if not await self._idle(began + self._bound_s - time.monotonic()):
            logger.warning("requests still run after %g s: they are aborted", self._bound_s)
            self._engine.abort_all()
            await self._idle(ABORT_S)
        self._written = await self._call(self.on_end, FLUSH_S)
        self.status = 0 if self._written else 1
        self._hanging_up = True  # What is left are readers without an end, and stuck connections.
        for task in (*self._working, *self._reading):
            task.cancel()
        await asyncio.sleep(0)
        try:
            await self._engine.stop()
        except Exception:
            logger.exception("the engine could not be stopped in an orderly way")
            self._leave(1)

    async def _idle(self, seconds: float) -> bool:
        """Wait until no request runs, at most so long; whether none does."""
        assert self._engine is not None
        until = time.monotonic() + seconds
        while self._working or self._engine.busy():
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _call(self, step: Callable[[], Awaitable[None]] | None, seconds: float) -> bool:
        if step is None:
            return True
        try:
            await asyncio.wait_for(step(), seconds)
        except Exception:
            # The end goes on: what could not be done is told, and counts in the exit status.
            logger.exception("%s failed while the server was ending", step)
            return False
        return True

    def _watch(self, seconds: float) -> None:
        """End the process where even the end hangs."""
        time.sleep(seconds)
        logger.error("the server has not ended in %g s: it is killed", seconds)
        self._leave(0 if self._written else 1)

    def _end_now(self, number: int, _frame: Any) -> None:
        self._leave(128 + number)

    def _leave(self, status: int) -> None:
        if self._engine is not None:
            self._engine.kill()
        sys.stderr.flush()
        os._exit(status)


class _Guard:
    """The middleware's form of `Drain.guard`."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            await self._drain.guard(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _refused(scope: Scope, *, working: bool) -> bool:
    if not working:
        return scope["path"] in _HEALTH
    return scope["path"] not in _ENDING and scope.get("method") != "DELETE"


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": DrainingError.kind})
        return
    error = DrainingError()
    body = {"error": {"type": error.kind, "message": error.message, "code": 503}}
    await JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})(scope, receive, send)
