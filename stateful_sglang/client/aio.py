"""The asynchronous client: as `sync.py`, with ``await``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx
from httpx_sse import EventSource

from stateful_sglang import loopback
from stateful_sglang.client.errors import SessionNotFoundError
from stateful_sglang.client.events import TurnProgress, is_stream
from stateful_sglang.client.sync import DEFAULT_TIMEOUT, response_error
from stateful_sglang.client.types import (
    AppendOptions,
    Messages,
    OpenOptions,
    Turn,
    append_body,
    open_body,
)


class AsyncClient:
    """A server, from one event loop."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:30000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=timeout,
            transport=transport,
            mounts=loopback.direct(base_url),
        )

    async def open(self, **options: Unpack[OpenOptions]) -> AsyncSession:
        """Open a session; nothing is computed before its first append."""
        reply = await self.request("POST", "/v1/sessions", open_body(options))
        return AsyncSession(self, reply["id"])

    def session(self, session_id: str) -> AsyncSession:
        """A handle on a session opened earlier; its existence is not checked."""
        return AsyncSession(self, session_id)

    async def sessions(self, limit: int = 100) -> list[dict[str, Any]]:
        """The sessions opened last."""
        reply = await self.request("GET", f"/v1/sessions?limit={limit}")
        found: list[dict[str, Any]] = reply["sessions"]
        return found

    async def tree(self, session: AsyncSession | None = None, limit: int = 100) -> dict[str, Any]:
        """The prefix tree, or the path of one session in it."""
        only = f"&session_id={session.id}" if session is not None else ""
        return await self.request("GET", f"/v1/tree?limit={limit}{only}")

    async def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One call; an error status is raised as its `ApiError`."""
        response = await self._http.request(method, path, json=body)
        if not response.is_success:
            raise response_error(response)
        reply: dict[str, Any] = response.json()
        return reply

    async def stream(self, path: str, body: Any) -> AsyncTurnStream:
        """A call whose answer is a stream of events."""
        request = self._http.build_request("POST", path, json=body)
        response = await self._http.send(request, stream=True)
        if not is_stream(response):
            await response.aread()
            raise response_error(response)
        return AsyncTurnStream(response)

    async def close(self) -> None:
        """Close the connections; sessions stay open on the server."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncTurnStream:
    """A running turn: iterate for its text, then read `turn`.

    Leaving an ``async with`` block around it early aborts the turn; breaking out of a bare loop
    does so only when the interpreter gets round to it.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._progress = TurnProgress()

    @property
    def turn(self) -> Turn:
        """The committed turn, once the text has been read to its end."""
        return self._progress.final()

    async def __aiter__(self) -> AsyncIterator[str]:
        async with self:
            async for event in EventSource(self._response).aiter_sse():
                if text := self._progress.take(event):
                    yield text
        self._progress.final()

    async def read(self) -> Turn:
        """Read on to the end and return the turn."""
        async for _ in self:
            pass
        return self.turn

    async def close(self) -> None:
        """Close the connection: aborts the turn unless it has ended."""
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncSession:
    """A conversation on the server. As a context manager it is closed at the end."""

    def __init__(self, client: AsyncClient, session_id: str) -> None:
        self._client = client
        self.id = session_id

    @overload
    async def append(
        self,
        messages: Messages | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[AppendOptions],
    ) -> Turn: ...

    @overload
    async def append(
        self,
        messages: Messages | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[AppendOptions],
    ) -> AsyncTurnStream: ...

    async def append(
        self,
        messages: Messages | None = None,
        *,
        stream: bool = False,
        **options: Unpack[AppendOptions],
    ) -> Turn | AsyncTurnStream:
        """Append what is new and generate the answer.

        Raises:
            ApiError: The kind that says what was wrong; nothing was committed.
        """
        body = append_body(messages, options, stream=stream)
        path = f"/v1/sessions/{self.id}/append"
        if stream:
            return await self._client.stream(path, body)
        return Turn.from_reply(await self._client.request("POST", path, body))

    async def get(self) -> dict[str, Any]:
        """The session as last committed."""
        return await self._client.request("GET", f"/v1/sessions/{self.id}")

    async def close(self) -> None:
        """Close the session; closing it twice is no error."""
        try:
            await self._client.request("DELETE", f"/v1/sessions/{self.id}")
        except SessionNotFoundError:
            return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
