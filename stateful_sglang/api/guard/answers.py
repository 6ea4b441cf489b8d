"""How a request is refused, in one form that OpenAI's and Anthropic's clients read too."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class Refusal(NamedTuple):
    """Why a request is not served."""

    status: int
    kind: str
    message: str
    headers: Mapping[str, str] = {}


async def refuse(scope: Scope, send: Send, refusal: Refusal, more: Headers = ()) -> None:
    """Answer a request, or refuse a WebSocket before it is one."""
    error = {
        "type": refusal.kind,
        "message": refusal.message,
        "param": None,
        "code": refusal.status,
    }
    body = json.dumps({"type": "error", "error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in refusal.headers.items()),
        *more,
    ]
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.kind})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def preflight(send: Send, origin: str, asked: Mapping[str, str]) -> None:
    """Tell the browser of an allowed page that the request which it asks about may be sent."""
    headers = [
        *readable_by(origin),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
        (b"content-length", b"0"),
    ]
    for what in ("method", "headers"):
        if (value := asked.get(f"access-control-request-{what}")) is not None:
            plural = what if what.endswith("s") else f"{what}s"
            headers.append((f"access-control-allow-{plural}".encode(), value.encode("latin-1")))
    if asked.get("access-control-request-private-network") == "true":
        headers.append((b"access-control-allow-private-network", b"true"))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def readable_by(origin: str) -> list[tuple[bytes, bytes]]:
    """Headers of an answer that an allowed page may read. Cookies are no part of it: none exist."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"*"),
        (b"vary", b"Origin"),
    ]


def to_page(send: Send, origin: str) -> Send:
    """A `send` that adds those headers."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), *readable_by(origin)]
            message = {**message, "headers": headers}
        await send(message)

    return sending
