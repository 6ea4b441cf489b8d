"""Server-sent events, as a stream brings them."""

from __future__ import annotations

import httpx
from httpx_sse import ServerSentEvent

from stateful_sglang.client.errors import StreamCutError, StreamDivergedError, error_of
from stateful_sglang.client.types import Event, Turn

_RETRY_AFTER_S = 1.0
"""What a refusal within a stream, which has no headers, asks for."""


class TurnProgress:
    """What a stream has brought so far, over all the connections that it took."""

    def __init__(self, key: str = "") -> None:
        """`key` is the request's idempotency key, for errors."""
        self.turn: Turn | None = None
        self._key = key
        self._given = ""
        self._at = 0

    def replay(self) -> None:
        """The stream begins again: what was given is passed over."""
        self._at = 0

    def take(self, event: ServerSentEvent) -> str:
        """New text, or none; an error event is raised. Events of newer servers are passed over."""
        if event.event == "delta":
            return self._new(str(event.json()["text"]))
        if event.event == "done":
            if self._at < len(self._given):
                raise StreamDivergedError(self._key)
            self.turn = Turn.from_reply(event.json())
        elif event.event == "error":
            body = event.json()
            error = error_of(int(body["error"].get("status", 500)), body)
            if error.status == 503:
                error.retry_after = _RETRY_AFTER_S
            raise error
        return ""

    def final(self) -> Turn:
        """The committed turn.

        Raises:
            StreamCutError: The stream ended before the turn did.
        """
        if self.turn is None:
            raise StreamCutError
        return self.turn

    def _new(self, text: str) -> str:
        known = self._given[self._at : self._at + len(text)]
        if not text.startswith(known):
            raise StreamDivergedError(self._key)
        new = text[len(known) :]
        self._at += len(text)
        self._given += new
        return new


def event_of(event: ServerSentEvent) -> Event:
    """An event of a session; an error event is raised."""
    data = event.json()
    if event.event == "error":
        raise error_of(int(data["error"].get("status", 500)), data)
    return Event(event.event, data)


def is_stream(response: httpx.Response) -> bool:
    """Whether a response is a stream of events: an error, ours or somebody else's, is not."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    return response.is_success and kind == "text/event-stream"
