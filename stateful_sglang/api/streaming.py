"""Answers that notice when the client goes away: while a request waits, runs, and is answered as
server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from stateful_sglang.api.errors import body_of, status_of
from stateful_sglang.service.results import SessionEvent, TurnResult
from stateful_sglang.service.turns import TurnReader
from stateful_sglang.session.errors import SessionError

T = TypeVar("T")

CLIENT_LEFT = 499
"""Status of an answer that nobody reads, for logs: what nginx writes there."""
HEARTBEAT_S = 15.0
"""Seconds without an event after which a comment shows that the connection still holds."""
_HEARTBEAT = b": nothing new\n\n"


class ClientLeftError(Exception):
    """The client closed the connection before it was answered."""


async def unless_left(
    receive: Receive, work: Coroutine[Any, Any, T], unwanted: Callable[[T], None] | None = None
) -> T:
    """What `work` returns; it is cancelled as soon as the client is gone.

    Args:
        receive: Of a request whose body was read.
        work: What the client waits for.
        unwanted: Told of a result that came when nobody waited for it any more.

    Raises:
        ClientLeftError: The client is gone.
    """
    gone = asyncio.create_task(_client_gone(receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda ended: _drop(ended, unwanted))


def _drop(ended: asyncio.Task[T], unwanted: Callable[[T], None] | None) -> None:
    if ended.cancelled() or ended.exception() is not None:
        return
    if unwanted is not None:
        unwanted(ended.result())


async def result_or_leave(reader: TurnReader, receive: Receive) -> TurnResult:
    """The turn's result; the turn loses its reader as soon as the client is gone."""
    try:
        return await unless_left(receive, reader.result())
    finally:
        reader.leave()


class EventStream(Response):
    """Server-sent events, until they end or the client is gone.

    Written out instead of Starlette's `StreamingResponse`, whose way of noticing a lost client
    depends on the server's protocol version; ours always closes `events`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        left: Callable[[], None] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`left` is called when nobody reads any more, the end included."""
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers={**unbuffered, **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_client_gone(receive))
        sent = asyncio.create_task(self._send_all(send))
        try:
            await asyncio.wait({gone, sent}, return_when=asyncio.FIRST_COMPLETED)
            if sent.done():
                sent.result()
        except OSError:
            pass  # the connection broke while we wrote: a lost client as well
        finally:
            self._left()
            gone.cancel()
            sent.cancel()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._events):
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def turn_events(
    reader: TurnReader, form: Callable[[TurnResult], dict[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """A turn from its start: ``delta``..., then ``done`` or ``error``. `form` makes ``done``."""
    async for text in reader.texts():
        yield _event("delta", {"text": text})
    try:
        yield _event("done", form(await reader.result()))
    except SessionError as error:
        yield _error_event(error)


class SessionEvents:
    """What happens to a session from now on; iterate once, over server-sent events."""

    def __init__(self, events: AsyncIterator[SessionEvent]) -> None:
        """`events` is listened to at once, before anybody reads them."""
        self._events = events
        self._next = self._listen()

    def leave(self) -> None:
        """Stop listening."""
        self._next.cancel()

    async def after(self, first: SessionEvent) -> AsyncGenerator[bytes, None]:
        """`first`, then the events, with a comment now and then where nothing happens."""
        yield _event(first.name, first.data)
        try:
            while True:
                await asyncio.wait({self._next}, timeout=HEARTBEAT_S)
                if not self._next.done():
                    yield _HEARTBEAT
                elif (event := self._next.result()) is None:
                    return
                else:
                    self._next = self._listen()
                    yield _event(event.name, event.data)
        except SessionError as error:
            yield _error_event(error)

    def _listen(self) -> asyncio.Task[SessionEvent | None]:
        task = asyncio.create_task(self._one())
        # Of one that nobody reads any more, the error is nobody's.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def _one(self) -> SessionEvent | None:
        # The end of a cancelled task closes the iterator too, if it is a generator.
        return await anext(self._events, None)


def _error_event(error: SessionError) -> bytes:
    body = body_of(error)
    body["error"]["status"] = status_of(error)
    return _event("error", body)


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    # Escaped to ASCII: some clients take U+2028 and its like for the end of the line.
    return f"event: {name}\ndata: {json.dumps(dict(data))}\n\n".encode()


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
