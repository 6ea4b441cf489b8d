"""A turn's server-sent events, as a stream brings them."""

from __future__ import annotations

import httpx
from httpx_sse import ServerSentEvent

from stateful_sglang.client.errors import ServerError, error_of
from stateful_sglang.client.types import Turn


class TurnProgress:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.turn: Turn | None = None

    def take(self, event: ServerSentEvent) -> str:
        """New text, or none; an error event is raised. Events of newer servers are passed over."""
        if event.event == "delta":
            return str(event.json()["text"])
        if event.event == "done":
            self.turn = Turn.from_reply(event.json())
        elif event.event == "error":
            body = event.json()
            raise error_of(int(body["error"].get("status", 500)), body)
        return ""

    def final(self) -> Turn:
        """The committed turn.

        Raises:
            ServerError: The stream ended before the turn did.
        """
        if self.turn is None:
            raise ServerError(
                502,
                {
                    "type": "stream_cut",
                    "message": "the stream ended before the turn; get the session for its version",
                },
            )
        return self.turn


def is_stream(response: httpx.Response) -> bool:
    """Whether a response is a stream of events: an error, ours or somebody else's, is not."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    return response.is_success and kind == "text/event-stream"
