"""Answers that notice when the client goes away: one JSON reply, or server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from stateful_sglang.api.errors import body_of, status_of
from stateful_sglang.service.results import TurnResult
from stateful_sglang.service.turns import RunningTurn
from stateful_sglang.session.errors import SessionError


async def reply_or_abort(turn: RunningTurn, receive: Receive) -> TurnResult:
    """The committed turn; the turn is aborted as soon as its client is gone."""
    gone = asyncio.create_task(_client_gone(receive))
    ended = asyncio.create_task(turn.wait())
    try:
        await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not turn.ended:
            await turn.abort()
        return await turn.result()
    finally:
        turn.cancel()
        gone.cancel()
        ended.cancel()


class TurnEvents(Response):
    """A turn as server-sent events: ``delta``..., then ``done`` or ``error``.

    Written out instead of Starlette's `StreamingResponse`, whose way of noticing a lost client
    depends on the server's protocol version; ours always aborts the turn.
    """

    media_type = "text/event-stream"

    def __init__(self, turn: RunningTurn, form: Callable[[TurnResult], dict[str, Any]]) -> None:
        """`form` makes the data of ``done``."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._turn = turn
        self._form = form

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
            self._turn.cancel()
            gone.cancel()
            sent.cancel()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        async for text in self._turn.texts():
            yield _event("delta", {"text": text})
        try:
            yield _event("done", self._form(await self._turn.result()))
        except SessionError as error:
            body = body_of(error)
            body["error"]["status"] = status_of(error)
            yield _event("error", body)


def _event(name: str, data: dict[str, Any]) -> bytes:
    # Escaped to ASCII: some clients take U+2028 and its like for the end of the line.
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
