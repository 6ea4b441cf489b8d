"""Each operation on a session as its client sees it: what it answered, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from bench.engines.dialogues import timed_request


class Done(NamedTuple):
    """An operation that was answered."""

    reply: dict[str, Any]
    seconds: float


class Turn(NamedTuple):
    """A turn that was answered."""

    usage: dict[str, Any]
    version: int
    ttft_s: float
    """From the request to the first text."""
    total_s: float

    @property
    def computed(self) -> int:
        """Prompt tokens that the model computed."""
        return int(self.usage["computed_tokens"])


class Operations:
    """The sessions of one server."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def open(self, **options: Any) -> Done:
        """Open a session."""
        return self._post("/v1/sessions", options)

    def take_in(self, body: bytes) -> Done:
        """Import a session: `body` is the whole request, so that nothing is made of it here."""
        began = time.perf_counter()
        headers = {"content-type": "application/json"}
        reply = self._client.post("/v1/sessions/import", content=body, headers=headers)
        return _done(reply, began)

    def get(self, session_id: str) -> Done:
        """Read a session."""
        began = time.perf_counter()
        return _done(self._client.get(f"/v1/sessions/{session_id}"), began)

    def list(self, **query: Any) -> Done:
        """Read a page of the list."""
        began = time.perf_counter()
        return _done(self._client.get("/v1/sessions", params=query), began)

    def export(self, session_id: str) -> Done:
        """Read all of a session."""
        began = time.perf_counter()
        return _done(self._client.get(f"/v1/sessions/{session_id}/export"), began)

    def fork(self, session_id: str, version: int | None = None) -> Done:
        """Fork a session."""
        body = {} if version is None else {"version": version}
        return self._post(f"/v1/sessions/{session_id}/fork", body)

    def roll_back(self, session_id: str, version: int) -> Done:
        """Take a session back."""
        return self._post(f"/v1/sessions/{session_id}/rollback", {"version": version})

    def ingest(self, session_id: str, messages: Sequence[Mapping[str, Any]]) -> Done:
        """Add messages without an answer."""
        return self._post(f"/v1/sessions/{session_id}/ingest", {"messages": list(messages)})

    def close(self, session_id: str) -> None:
        """End a session."""
        self._client.delete(f"/v1/sessions/{session_id}").raise_for_status()

    def append(self, session_id: str, max_tokens: int, **content: Any) -> Turn:
        """Append and read the answer as a stream; without content, generate."""
        body = {
            **content,
            "sampling": {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True},
        }
        operation = "append" if content else "generate"
        asked = timed_request(self._client, f"/v1/sessions/{session_id}/{operation}", body)
        name, done = asked.events[-1]
        if name != "done":
            raise RuntimeError(f"the server broke the turn off: {done}")
        return Turn(done["usage"], done["version"], asked.ttft_ms / 1e3, asked.total_ms / 1e3)

    def _post(self, path: str, body: Mapping[str, Any]) -> Done:
        began = time.perf_counter()
        return _done(self._client.post(path, json=body), began)


def _done(reply: httpx.Response, began: float) -> Done:
    took = time.perf_counter() - began
    if not reply.is_success:
        raise RuntimeError(f"{reply.url.path}: {reply.status_code} {reply.text[:500]}")
    return Done(reply.json(), took)
