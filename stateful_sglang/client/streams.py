"""Answers that come piece by piece: running turns, and what happens to a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
from httpx_sse import EventSource, ServerSentEvent

from stateful_sglang.client.errors import ApiError, response_error
from stateful_sglang.client.events import TurnProgress, event_of, is_stream
from stateful_sglang.client.retries import KEY, Attempts
from stateful_sglang.client.types import Event, Turn

EVENTS_TIMEOUT = httpx.Timeout(10.0, read=60.0)
"""Seconds; a server that lives says so every 15."""


ClientT = TypeVar("ClientT", bound=httpx.Client | httpx.AsyncClient)


class _Asked(Generic[ClientT]):
    """A request whose answer comes piece by piece."""

    _timeout: httpx.Timeout | None = None

    def __init__(
        self,
        http: ClientT,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        attempts: Attempts,
    ) -> None:
        """Nothing is sent before `connect`."""
        self._http = http
        self._method = method
        self._path = path
        self._body = body
        self._attempts = attempts
        self._response: httpx.Response | None = None

    @property
    def _key(self) -> str:
        """By which the request can be sent again; empty where it has none."""
        return str((self._body or {}).get(KEY) or "")

    def _request(self) -> httpx.Request:
        timeout = self._timeout or self._http.timeout
        return self._http.build_request(self._method, self._path, json=self._body, timeout=timeout)


class _Stream(_Asked[httpx.Client]):
    """A connection that is read while it lasts."""

    def connect(self) -> None:
        """Send the request, again if need be, up to the beginning of its answer."""
        while True:
            try:
                response = self._http.send(self._request(), stream=True)
                if is_stream(response):
                    self._response = response
                    return
                response.read()
                raise response_error(response)
            except (httpx.TransportError, ApiError) as error:
                time.sleep(self._attempts.pause(error))

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()

    def _events(self) -> Iterator[ServerSentEvent]:
        assert self._response is not None
        yield from EventSource(self._response).iter_sse()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _AsyncStream(_Asked[httpx.AsyncClient]):
    """The same, with ``await``."""

    async def connect(self) -> None:
        """Send the request, again if need be, up to the beginning of its answer."""
        while True:
            try:
                response = await self._http.send(self._request(), stream=True)
                if is_stream(response):
                    self._response = response
                    return
                await response.aread()
                raise response_error(response)
            except (httpx.TransportError, ApiError) as error:
                await asyncio.sleep(self._attempts.pause(error))

    async def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            await self._response.aclose()

    async def _events(self) -> AsyncIterator[ServerSentEvent]:
        assert self._response is not None
        async for event in EventSource(self._response).aiter_sse():
            yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class TurnStream(_Stream):
    """A running turn: iterate for its text, then read `turn`. Leaving early aborts the turn, unless
    it is detached."""

    @cached_property
    def _progress(self) -> TurnProgress:
        return TurnProgress(self._key)

    @property
    def turn(self) -> Turn:
        """The committed turn, once the text has been read to its end."""
        return self._progress.final()

    def __iter__(self) -> Iterator[str]:
        with self:
            while self._progress.turn is None:
                try:
                    for event in self._events():
                        if text := self._progress.take(event):
                            yield text
                    self._progress.final()
                except (httpx.TransportError, ApiError) as error:
                    self.close()
                    time.sleep(self._attempts.pause(error))
                    # The same request: the server joins it to its turn, from the first word on.
                    self.connect()
                    self._progress.replay()

    def read(self) -> Turn:
        """Read on to the end and return the turn."""
        for _ in self:
            pass
        return self.turn


class AsyncTurnStream(_AsyncStream):
    """A running turn: iterate for its text, then read `turn`.

    Leaving an ``async with`` block around it early aborts the turn, unless it is detached; breaking
    out of a bare loop does so only when the interpreter gets round to it.
    """

    @cached_property
    def _progress(self) -> TurnProgress:
        return TurnProgress(self._key)

    @property
    def turn(self) -> Turn:
        """The committed turn, once the text has been read to its end."""
        return self._progress.final()

    async def __aiter__(self) -> AsyncIterator[str]:
        async with self:
            while self._progress.turn is None:
                try:
                    async for event in self._events():
                        if text := self._progress.take(event):
                            yield text
                    self._progress.final()
                except (httpx.TransportError, ApiError) as error:
                    await self.close()
                    await asyncio.sleep(self._attempts.pause(error))
                    # The same request: the server joins it to its turn, from the first word on.
                    await self.connect()
                    self._progress.replay()

    async def read(self) -> Turn:
        """Read on to the end and return the turn."""
        async for _ in self:
            pass
        return self.turn


class Events(_Stream):
    """What happens to a session, from now on, until it is closed or expires."""

    _timeout = EVENTS_TIMEOUT

    def __iter__(self) -> Iterator[Event]:
        with self:
            for event in self._events():
                yield event_of(event)


class AsyncEvents(_AsyncStream):
    """What happens to a session, from now on, until it is closed or expires."""

    _timeout = EVENTS_TIMEOUT

    async def __aiter__(self) -> AsyncIterator[Event]:
        async with self:
            async for event in self._events():
                yield event_of(event)
