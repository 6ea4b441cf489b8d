"""The synchronous client: a `Session` sends only what is new."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload
from urllib.parse import quote

import httpx

from stateful_sglang import loopback
from stateful_sglang.client import retries
from stateful_sglang.client.errors import (
    ApiError,
    PrefixNotFoundError,
    SessionGoneError,
    SessionNotFoundError,
    response_error,
)
from stateful_sglang.client.retries import Attempts, Retries
from stateful_sglang.client.streams import Events, TurnStream
from stateful_sglang.client.types import (
    AppendOptions,
    ForkOptions,
    GenerateOptions,
    Ingested,
    KeptOptions,
    ListOptions,
    Messages,
    OpenOptions,
    PublishOptions,
    SessionPage,
    Turn,
    WriteOptions,
    append_body,
    given,
    list_query,
    message_list,
    open_body,
    prefix_path,
    publish_body,
)

DEFAULT_URL = "http://127.0.0.1:30000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""Seconds; a long prompt on a small machine takes its time."""


class Client:
    """A server. Thread-safe, as httpx's client is."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        max_retries: int = Retries.most,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            base_url: Of the server.
            api_key: Sent with each request.
            timeout: Of each attempt.
            max_retries: How often a request is sent again when the connection breaks or the server
                is not there for now (503 with Retry-After), at growing intervals: about a minute in
                all by default. Requests that change something carry an idempotency key for it.
            transport: In place of the network.
        """
        self._retries = Retries(max_retries)
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
        reply = self.request("POST", "/v1/sessions", open_body(options), keyed=True)
        return Session(self, reply["id"])

    def session(self, session_id: str) -> Session:
        """A handle on a session opened earlier; its existence is not checked."""
        return Session(self, session_id)

    def sessions(self, *, after: str | None = None, **options: Unpack[ListOptions]) -> SessionPage:
        """A page of one's own sessions, the last used first; `after` is the last page's `next`."""
        query = list_query(options, after)
        return SessionPage(self.request("GET", "/v1/sessions", query=query))

    def all_sessions(self, **options: Unpack[ListOptions]) -> Iterator[dict[str, Any]]:
        """The sessions of all pages."""
        page = self.sessions(**options)
        yield from page
        while page.next is not None:
            page = self.sessions(after=page.next, **options)
            yield from page

    def import_session(
        self,
        exported: Mapping[str, Any],
        *,
        accept_other_model: bool = False,
        idempotency_key: str | None = None,
    ) -> Session:
        """Open a session as `Session.export` gave it, here or on another server.

        Args:
            exported: What `Session.export` returned.
            accept_other_model: Take one of another model or chat template: its tokens can't be
                continued, so that its messages are rendered again.
            idempotency_key: The same key with the same session opens one.

        Raises:
            OtherModelError: It belongs to another model or chat template.
        """
        body = given(
            {
                "session": dict(exported),
                "accept_other_model": accept_other_model or None,
                "idempotency_key": idempotency_key,
            }
        )
        reply = self.request("POST", "/v1/sessions/import", body, keyed=True)
        return Session(self, reply["id"])

    def publish(self, **options: Unpack[PublishOptions]) -> dict[str, Any]:
        """Publish a prefix to all tenants, for administrators: how it is then.

        What is published already is answered as it is.

        Raises:
            PublishRefusedError: There is no room for it beside the others.
        """
        body = publish_body(options)
        return self.request("POST", "/v1/prefixes", body, repeatable=True)

    def prefixes(self) -> list[dict[str, Any]]:
        """What is published, the oldest first, for administrators."""
        reply = self.request("GET", "/v1/prefixes")
        return list(reply["prefixes"])

    def unpublish(self, prefix_id: str) -> None:
        """Publish a prefix no longer; one that is not published is no error."""
        try:
            self.request("DELETE", prefix_path(prefix_id))
        except PrefixNotFoundError:
            return

    def tree(self, session: Session | None = None, limit: int = 100) -> dict[str, Any]:
        """The prefix tree, or the path of one session in it."""
        only = session.id if session is not None else None
        return self.request("GET", "/v1/tree", query=given({"limit": limit, "session_id": only}))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        keyed: bool = False,
        repeatable: bool = False,
    ) -> dict[str, Any]:
        """One call, sent again where that may help; an error status is raised as its `ApiError`.

        Args:
            method: Of HTTP.
            path: On the server.
            body: As JSON.
            query: Of the URL.
            keyed: The call takes an idempotency key, so that it can be sent again whatever became
                of it; a body without one gets one.
            repeatable: It does the same twice as once, though it takes no key.
        """
        if keyed:
            body = retries.keyed(body or {}, self._retries)
        attempts = Attempts(self._retries, method, body, repeatable=repeatable)
        while True:
            try:
                response = self._http.request(method, path, json=body, params=query)
                if not response.is_success:
                    raise response_error(response)
            except (httpx.TransportError, ApiError) as error:
                time.sleep(attempts.pause(error))
            else:
                reply: dict[str, Any] = response.json()
                return reply

    def stream(self, path: str, body: Any) -> TurnStream:
        """A call whose answer is a turn as a stream of events; it takes an idempotency key."""
        body = retries.keyed(body, self._retries)
        attempts = Attempts(self._retries, "POST", body)
        turn = TurnStream(self._http, "POST", path, body, attempts)
        turn.connect()
        return turn

    def events(self, path: str) -> Events:
        """A call whose answer is a stream of events that lasts."""
        events = Events(self._http, "GET", path, None, Attempts(self._retries, "GET"))
        events.connect()
        return events

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


class Session:
    """A conversation on the server. As a context manager it is closed at the end."""

    def __init__(self, client: Client, session_id: str) -> None:
        self._client = client
        self.id = session_id

    def path(self, operation: str = "") -> str:
        """Of the session's routes, or of one of them."""
        own = f"/v1/sessions/{quote(self.id, safe='')}"
        return f"{own}/{operation}" if operation else own

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
        return self._answer("append", append_body(messages, options, stream=stream))

    @overload
    def generate(
        self, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Turn: ...

    @overload
    def generate(
        self, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> TurnStream: ...

    def generate(
        self, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Turn | TurnStream:
        """Generate the answer to what is there, ingested messages among it.

        Raises:
            ApiError: The kind that says what was wrong; nothing was committed.
        """
        return self._answer("generate", append_body(None, options, stream=stream))

    def ingest(self, messages: Messages, **options: Unpack[WriteOptions]) -> Ingested:
        """Append messages without generating; results of tools in any order."""
        body = given({**options, "messages": message_list(messages)})
        return Ingested.from_reply(self._post("ingest", body))

    def fork(self, version: int | None = None, **options: Unpack[ForkOptions]) -> Session:
        """Another session with this one's past, up to a version; nothing is copied or computed."""
        reply = self._post("fork", given({**options, "version": version}))
        return Session(self._client, reply["id"])

    def rollback(self, version: int, **options: Unpack[WriteOptions]) -> dict[str, Any]:
        """Back to a version; the session as it is then."""
        return self._post("rollback", given({**options, "version": version}))

    def edit(
        self,
        after: int,
        messages: Messages | None = None,
        *,
        through: int | None = None,
        **options: Unpack[WriteOptions],
    ) -> dict[str, Any]:
        """Put messages, or nothing, in the place of the turns behind version `after`, up to version
        `through` or the end; the session as it is then."""
        replaced = None if messages is None else message_list(messages)
        body = {**options, "after": after, "through": through, "messages": replaced}
        return self._post("edit", given(body))

    def touch(self, **options: Unpack[KeptOptions]) -> dict[str, Any]:
        """Say that the session is in use, and change how it is kept; the session as it is then."""
        return self._client.request("POST", self.path("touch"), given(options))

    def get(self) -> dict[str, Any]:
        """The session as last committed."""
        return self._client.request("GET", self.path())

    def messages(self, version: int | None = None) -> dict[str, Any]:
        """The messages of a version, the newest by default."""
        return self._client.request("GET", self.path("messages"), query=given({"version": version}))

    def events(self) -> Events:
        """What happens to the session from now on."""
        return self._client.events(self.path("events"))

    def export(self) -> dict[str, Any]:
        """The session with all its versions, for `Client.import_session`."""
        return self._client.request("GET", self.path("export"))

    def close(self, *, erase: bool = False) -> None:
        """Close the session; closing it twice is no error.

        Args:
            erase: Remove its content from the server's files before this returns.
        """
        try:
            self._client.request("DELETE", self.path(), query={"erase": True} if erase else None)
        except (SessionNotFoundError, SessionGoneError):
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

    def _answer(self, operation: str, body: dict[str, Any]) -> Turn | TurnStream:
        if body.get("stream"):
            return self._client.stream(self.path(operation), body)
        return Turn.from_reply(self._post(operation, body))

    def _post(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._client.request("POST", self.path(operation), body, keyed=True)
