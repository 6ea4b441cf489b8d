"""The two ways to hold a conversation: a session on the server, or everything sent every time.

Both are timed by the client: from the request to the first text and to the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import httpx

from bench.engines import package

Message = Mapping[str, str]
"""Of a conversation: ``role`` and ``content``."""


@dataclass(frozen=True)
class Opening:
    """What a conversation begins with."""

    system: str
    tools: Sequence[Mapping[str, Any]]
    examples: Sequence[tuple[str, str]]
    """Requests and the calls that answered them."""

    def example_messages(self) -> list[dict[str, str]]:
        """The examples as messages of an earlier conversation."""
        return [
            {"role": role, "content": content}
            for request, call in self.examples
            for role, content in (("user", request), ("assistant", call))
        ]


@dataclass(frozen=True)
class Manner:
    """How answers are asked for; always greedily."""

    max_tokens: int
    stream: bool = False
    call: bool = False
    """An answer is one call of the opening's tools."""


class Reply(NamedTuple):
    """One turn as its client saw it."""

    history_tokens: int
    delta_tokens: int
    computed_tokens: int
    """Prompt tokens that the model had to compute."""
    generated_tokens: int
    ttft_ms: float
    """Without a stream the same as `total_ms`."""
    total_ms: float
    accepted_per_step: float | None
    """Tokens that a decode step brought; None where the server does not say."""
    sent_bytes: int
    text: str

    @property
    def prompt_tokens(self) -> int:
        """All that the model read for the answer."""
        return self.history_tokens + self.delta_tokens


class Dialogue(Protocol):
    """A way to hold one conversation."""

    def say(self, messages: Sequence[Message], answer: str) -> Reply:
        """Say something and have it answered.

        Args:
            messages: What is new.
            answer: What the conversation goes on with, whatever the answer is now, where the client
                keeps the conversation.

        Raises:
            RuntimeError: The server refused or broke off.
        """

    def close(self) -> None:
        """End the conversation."""


class SessionDialogue:
    """Opens a session and appends what is new."""

    def __init__(self, client: httpx.Client, manner: Manner, opening: Opening | None = None):
        self._client = client
        self._manner = manner
        self._open: dict[str, Any] = {}
        if opening is not None:
            self._open = {
                "system": opening.system,
                "tools": list(opening.tools),
                "messages": opening.example_messages(),
            }
        self._id = ""

    def say(self, messages: Sequence[Message], answer: str) -> Reply:
        """See `Dialogue`."""
        if not self._id:
            opened = self._client.post("/v1/sessions", json=self._open).raise_for_status()
            self._id = opened.json()["id"]
        manner = self._manner
        body: dict[str, Any] = {
            "messages": list(messages),
            "sampling": {"temperature": 0, "max_tokens": manner.max_tokens},
        }
        if manner.call:
            body["tool_choice"] = "required"
        path = f"/v1/sessions/{self._id}/append"
        asked = _ask(self._client, path, body, manner.stream, lambda name, _: name == "delta")
        name, done = asked.events[-1] if asked.events else ("", None)
        if name not in ("done", WHOLE):
            raise RuntimeError(f"the server broke the turn off: {done}")
        usage = done["usage"]
        return Reply(
            usage["history_tokens"],
            usage["delta_tokens"],
            usage["computed_tokens"],
            usage["generated_tokens"],
            asked.ttft_ms,
            asked.total_ms,
            usage["accepted_per_step"],
            asked.sent_bytes,
            done["text"],
        )

    def close(self) -> None:
        """See `Dialogue`."""
        if self._id:
            self._client.delete(f"/v1/sessions/{self._id}").raise_for_status()


class StatelessDialogue:
    """Sends the whole conversation to `/v1/chat/completions`, as agents do today."""

    def __init__(self, client: httpx.Client, manner: Manner, opening: Opening | None = None):
        self._client = client
        self._manner = manner
        self._messages: list[dict[str, Any]] = []
        self._tools: Sequence[Mapping[str, Any]] = ()
        if opening is not None:
            # The default model's template knows no tools: the server states them in the system
            # prompt, and so must we.
            system = f"{opening.system}\n\n{package.tool_prompt(opening.tools)}"
            self._messages = [{"role": "system", "content": system}, *opening.example_messages()]
            self._tools = opening.tools
        self._tokens = 0

    def say(self, messages: Sequence[Message], answer: str) -> Reply:
        """See `Dialogue`."""
        self._messages += package.plain_form(messages)
        manner = self._manner
        body: dict[str, Any] = {
            "model": "default",
            "messages": self._messages,
            "temperature": 0,
            "max_tokens": manner.max_tokens,
        }
        if manner.call:
            schema = {"name": "call", "schema": package.tool_call_schema(self._tools)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if manner.stream:
            body["stream_options"] = {"include_usage": True}
        asked = _ask(
            self._client,
            "/v1/chat/completions",
            body,
            manner.stream,
            lambda _, data: bool(_text(data)),
        )
        usage: dict[str, Any] = {}
        for _, data in asked.events:
            usage = data.get("usage") or usage
        self._messages.append({"role": "assistant", "content": answer})
        history, prompt = self._tokens, usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self._tokens = prompt + usage["completion_tokens"]
        return Reply(
            history,
            prompt - history,
            prompt - cached,
            usage["completion_tokens"],
            asked.ttft_ms,
            asked.total_ms,
            None,
            asked.sent_bytes,
            "".join(_text(data) for _, data in asked.events),
        )

    def close(self) -> None:
        """The server remembers nothing that would need closing."""


WHOLE = "whole"
"""Name of the only event of an answer that is not streamed."""


class Asked(NamedTuple):
    """A request as its client saw it."""

    events: list[tuple[str, Any]]
    """Name (may be empty) and parsed data."""
    ttft_ms: float
    total_ms: float
    sent_bytes: int


def timed_request(client: httpx.Client, path: str, body: Mapping[str, Any]) -> Asked:
    """A turn of a session as a stream; the last event has its result, or what became of it.

    Raises:
        RuntimeError: The server refused.
    """
    return _ask(client, path, body, True, lambda name, _: name == "delta")


def _ask(
    client: httpx.Client,
    path: str,
    body: Mapping[str, Any],
    stream: bool,
    is_text: Callable[[str, Any], bool],
) -> Asked:
    began = time.perf_counter()
    first = None
    events: list[tuple[str, Any]] = []
    whole = {**body, "stream": True} if stream else body
    with client.stream("POST", path, json=whole) as reply:
        if reply.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path}: {reply.status_code} {reply.read().decode()}")
        sent = int(reply.request.headers["content-length"])
        if not stream:
            events.append((WHOLE, json.loads(reply.read())))
        else:
            for event in _events(reply.iter_lines()):
                if first is None and is_text(*event):
                    first = time.perf_counter()
                events.append(event)
    end = time.perf_counter()
    return Asked(events, 1e3 * ((first or end) - began), 1e3 * (end - began), sent)


def _events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: ") and line != "data: [DONE]":
            yield name, json.loads(line.removeprefix("data: "))


def _text(data: Mapping[str, Any]) -> str:
    """What a chat completion, or a chunk of one, says."""
    said = (
        choice.get("delta") or choice.get("message") or {} for choice in data.get("choices", ())
    )
    return "".join(part.get("content") or "" for part in said)
