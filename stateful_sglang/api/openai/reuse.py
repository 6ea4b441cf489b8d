"""What was reused for a request, in a header of its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from stateful_sglang.service.conversations import Reuse

HEADER = "x-stateful-session"
STATE = "stateful_reuse"
"""Under which `request.state` has the `Reuse` of a request that found its session."""

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class ReuseHeader:
    """ASGI middleware: answers to conversations say which session they went on with."""

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        """Stand in front of an application."""
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        state: Mapping[str, Any] = scope.setdefault("state", {})

        async def told(message: _Message) -> None:
            reuse = state.get(STATE)
            if message["type"] == "http.response.start" and reuse is not None:
                line = (HEADER.encode(), header(reuse).encode("latin-1"))
                message = {**message, "headers": [*message.get("headers", ()), line]}
            await send(message)

        await self._app(scope, receive, told)


def header(reuse: Reuse) -> str:
    """The header's value: ``match=append; id=...; version=...; history=...; delta=...; ...``."""
    found = {
        "match": reuse.match,
        "id": reuse.session_id,
        "version": str(reuse.version),
        "history": str(reuse.history_tokens),
        "delta": str(reuse.delta_tokens),
        "messages": str(reuse.messages),
    }
    if reuse.divergence is not None:
        at = reuse.divergence
        found["divergence"] = f"messages[{at.message}].{at.field}@{at.offset}"
    return "; ".join(f"{name}={value}" for name, value in found.items())
