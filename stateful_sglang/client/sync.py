"""The synchronous client: a `Session` sends only what is new."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx
from httpx_sse import EventSource

from stateful_sglang import loopback
from stateful_sglang.client.errors import ApiError, SessionNotFoundError, error_of
from stateful_sglang.client.events import TurnProgress, is_stream
from stateful_sglang.client.types import (
    AppendOptions,
    Messages,
    OpenOptions,
    Turn,
    append_body,
    open_body,
)

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""Seconds; a long prompt on a small machine takes its time."""


class Client:
    """A server. Thread-safe, as httpx's client is."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:30000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        self._http = httpx.Client(
            base_url=base_url,
            headers=headers,
            timeout=timeout,
            transport=transport,
            mounts=loopback.direct(base_url),
        )

    def open(self, **options: Unpack[OpenOptions]) -> Session:
        """Open a session; nothing is computed before its first append."""
        reply = self.request("POST", "/v1/sessions", open_body(options))
        return Session(self, reply["id"])

    def session(self, session_id: str) -> Session:
        """A handle on a session opened earlier; its existence is not checked."""
        return Session(self, session_id)

    def sessions(self, limit: int = 100) -> list[dict[str, Any]]:
        """The sessions opened last."""
        found: list[dict[str, Any]] = self.request("GET", f"/v1/sessions?limit={limit}")["sessions"]
        return found

    def tree(self, session: Session | None = None, limit: int = 100) -> dict[str, Any]:
        """The prefix tree, or the path of one session in it."""
        only = f"&session_id={session.id}" if session is not None else ""
        return self.request("GET", f"/v1/tree?limit={limit}{only}")

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One call; an error status is raised as its `ApiError`."""
        response = self._http.request(method, path, json=body)
        if not response.is_success:
            raise response_error(response)
        reply: dict[str, Any] = response.json()
        return reply

    def stream(self, path: str, body: Any) -> TurnStream:
        """A call whose answer is a stream of events."""
        request = self._http.build_request("POST", path, json=body)
        response = self._http.send(request, stream=True)
        if not is_stream(response):
            response.read()
            raise response_error(response)
        return TurnStream(response)

    def close(self) -> None:
        """Close the connections; sessions stay open on the server."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class TurnStream:
    """A running turn: iterate for its text, then read `turn`. Leaving early aborts the turn."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._progress = TurnProgress()

    @property
    def turn(self) -> Turn:
        """The committed turn, once the text has been read to its end."""
        return self._progress.final()

    def __iter__(self) -> Iterator[str]:
        with self:
            for event in EventSource(self._response).iter_sse():
                if text := self._progress.take(event):
                    yield text
        self._progress.final()

    def read(self) -> Turn:
        """Read on to the end and return the turn."""
        for _ in self:
            pass
        return self.turn

    def close(self) -> None:
        """Close the connection: aborts the turn unless it has ended."""
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """A conversation on the server. As a context manager it is closed at the end."""

    def __init__(self, client: Client, session_id: str) -> None:
        self._client = client
        self.id = session_id

    @overload
    def append(
        self,
        messages: Messages | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[AppendOptions],
    ) -> Turn: ...

    @overload
    def append(
        self,
        messages: Messages | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[AppendOptions],
    ) -> TurnStream: ...

    def append(
        self,
        messages: Messages | None = None,
        *,
        stream: bool = False,
        **options: Unpack[AppendOptions],
    ) -> Turn | TurnStream:
        """Append what is new and generate the answer.

        Raises:
            ApiError: The kind that says what was wrong; nothing was committed.
        """
        body = append_body(messages, options, stream=stream)
        path = f"/v1/sessions/{self.id}/append"
        if stream:
            return self._client.stream(path, body)
        return Turn.from_reply(self._client.request("POST", path, body))

    def get(self) -> dict[str, Any]:
        """The session as last committed."""
        return self._client.request("GET", f"/v1/sessions/{self.id}")

    def close(self) -> None:
        """Close the session; closing it twice is no error."""
        try:
            self._client.request("DELETE", f"/v1/sessions/{self.id}")
        except SessionNotFoundError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def response_error(response: httpx.Response) -> ApiError:
    """The exception for an error response, its body read."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    return error_of(response.status_code, body)
