"""The two ways to hold the demo's conversation: a session on the server, or everything every time.

Both stream, and both are timed by the client: from the request to the first text and to the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from stateful_sglang.grammar.calls import tool_call_schema
from stateful_sglang.session.messages import Message, plain_form, tool_prompt

MAX_TOKENS = 96


@dataclass(frozen=True)
class Turn:
    """One turn as its client saw it."""

    agent: str
    number: int
    """From 1."""
    history_tokens: int
    delta_tokens: int
    computed_tokens: int
    """Prompt tokens that the model had to compute."""
    generated_tokens: int
    ttft_ms: float
    total_ms: float
    accepted_per_step: float | None
    """Tokens that a decode step brought; None where the server does not say."""
    text: str

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens a second after the first text; None where all came at once."""
        seconds = (self.total_ms - self.ttft_ms) / 1e3
        return (self.generated_tokens - 1) / seconds if seconds > 1e-3 else None


@dataclass
class _Clock:
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def text(self) -> None:
        """Text came."""
        if self.first is None:
            self.first = time.perf_counter()

    def ttft_and_total_ms(self) -> tuple[float, float]:
        end = time.perf_counter()
        return 1e3 * ((self.first or end) - self.began), 1e3 * (end - self.began)


@dataclass(frozen=True)
class Head:
    """What every conversation begins with."""

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


class StatefulArm:
    """Opens a session an agent and appends what is new."""

    def __init__(self, client: httpx.Client, head: Head):
        self._client = client
        self._open = {
            "system": head.system,
            "tools": list(head.tools),
            "messages": head.example_messages(),
        }
        self._ids: dict[str, str] = {}

    def turn(self, agent: str, number: int, messages: Sequence[Message], answer: str) -> Turn:
        """Append `messages` and generate. `answer`, the recorded one, is not needed here."""
        if agent not in self._ids:
            reply = self._client.post("/v1/sessions", json=self._open).raise_for_status()
            self._ids[agent] = reply.json()["id"]
        body = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS},
            "tool_choice": "required",
            "stream": True,
        }
        clock, done = _Clock(), {}
        with _stream(self._client, f"/v1/sessions/{self._ids[agent]}/append", body) as events:
            for event, data in events:
                if event == "delta":
                    clock.text()
                elif event == "done":
                    done = data
                else:
                    raise RuntimeError(f"the server ended turn {number} of {agent}: {data}")
        ttft_ms, total_ms = clock.ttft_and_total_ms()
        usage = done["usage"]
        return Turn(
            agent,
            number,
            usage["history_tokens"],
            usage["delta_tokens"],
            usage["computed_tokens"],
            usage["generated_tokens"],
            ttft_ms,
            total_ms,
            usage["accepted_per_step"],
            done["text"],
        )

    def close(self) -> None:
        """Close the sessions."""
        for session_id in self._ids.values():
            self._client.delete(f"/v1/sessions/{session_id}").raise_for_status()


class StatelessArm:
    """Sends the whole conversation to `/v1/chat/completions`, as agents do today.

    Its history holds the recorded answers, so that both arms are asked the same.
    """

    def __init__(self, client: httpx.Client, head: Head):
        self._client = client
        # The default model's template knows no tools: both arms state them in the system prompt.
        system = f"{head.system}\n\n{tool_prompt(head.tools)}"
        self._head = [{"role": "system", "content": system}, *head.example_messages()]
        self._schema = tool_call_schema(head.tools)
        self._conversations: dict[str, list[dict[str, Any]]] = {}
        self._tokens: dict[str, int] = {}

    def turn(self, agent: str, number: int, messages: Sequence[Message], answer: str) -> Turn:
        """Send everything so far with `messages` at its end; keep `answer` as what was said."""
        conversation = self._conversations.setdefault(agent, list(self._head))
        conversation += plain_form(messages)
        body = {
            "model": "default",
            "messages": conversation,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "call", "schema": self._schema},
            },
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        clock, text, usage = _Clock(), "", {}
        with _stream(self._client, "/v1/chat/completions", body) as events:
            for _, data in events:
                usage = data.get("usage") or usage
                for choice in data.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        clock.text()
                        text += piece
        ttft_ms, total_ms = clock.ttft_and_total_ms()
        conversation.append({"role": "assistant", "content": answer})
        history = self._tokens.get(agent, 0)
        prompt = usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self._tokens[agent] = prompt + usage["completion_tokens"]
        return Turn(
            agent,
            number,
            history,
            prompt - history,
            prompt - cached,
            usage["completion_tokens"],
            ttft_ms,
            total_ms,
            None,
            text,
        )

    def close(self) -> None:
        """The server remembers nothing that would need closing."""


Arm = StatefulArm | StatelessArm


@contextmanager
def _stream(
    client: httpx.Client, path: str, body: Mapping[str, Any]
) -> Iterator[Iterator[tuple[str, Any]]]:
    """Post, and yield the server-sent events: name (may be empty) and parsed data."""
    with client.stream("POST", path, json=body) as reply:
        if reply.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path}: {reply.status_code} {reply.read().decode()}")
        yield _events(reply.iter_lines())


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: ") and line != "data: [DONE]":
            yield name, json.loads(line.removeprefix("data: "))
