"""Reading server-sent events of a turn."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from stateful_sglang.client.errors import ServerError, error_of
from stateful_sglang.client.types import Turn


class Event(NamedTuple):
    """One event: its name and its data."""

    name: str
    data: Any


class EventReader:
    """Cuts a byte stream into events, however it arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes."""
        *blocks, self._buffer = (self._buffer + data).replace(b"\r\n", b"\n").split(b"\n\n")
        return [event for block in blocks if (event := _event(block)) is not None]


def _event(block: bytes) -> Event | None:
    name, data = "message", []
    for line in block.decode().split("\n"):
        field, _, value = line.partition(":")
        if field == "event":
            name = value.strip()
        elif field == "data":
            data.append(value.removeprefix(" "))
    return Event(name, json.loads("\n".join(data))) if data else None


class TurnProgress:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self._reader = EventReader()
        self.turn: Turn | None = None

    def feed(self, data: bytes) -> list[str]:
        """New pieces of text; an error event is raised."""
        texts = []
        for event in self._reader.feed(data):
            if event.name == "delta":
                texts.append(event.data["text"])
            elif event.name == "done":
                self.turn = Turn.from_reply(event.data)
            elif event.name == "error":
                raise error_of(int(event.data["error"].get("status", 500)), event.data)
        return texts

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
