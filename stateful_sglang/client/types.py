"""What goes to the server and what comes back, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from stateful_sglang.service.results import Usage

MessageParam = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, as OpenAI's clients write it."""
Messages = str | MessageParam | Sequence[MessageParam]
"""A lone string is a user message."""
ToolChoice = Literal["auto", "none", "required"]

_USAGE_FIELDS = frozenset(field.name for field in fields(Usage))


@dataclass(frozen=True)
class ToolCall:
    """A call the model made."""

    id: str
    name: str
    arguments: str
    """JSON text, as generated."""

    def parsed(self) -> Any:
        """The arguments as an object."""
        return json.loads(self.arguments)

    def result(self, content: str) -> dict[str, Any]:
        """The message that answers this call."""
        return {
            "role": "tool",
            "tool_call_id": self.id,
            "name": self.name,
            "content": content,
        }


@dataclass(frozen=True)
class Turn:
    """A committed turn."""

    id: str
    """The session's id."""
    version: int
    text: str
    """All generated text."""
    content: str
    """The text without tool calls."""
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    output_ids: tuple[int, ...] | None = None

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Turn:
        """A turn from the server's reply; fields of newer servers are passed over."""
        message = reply["message"]
        calls = tuple(
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        )
        usage = {name: value for name, value in reply["usage"].items() if name in _USAGE_FIELDS}
        ids = reply.get("output_ids")
        return cls(
            id=reply["id"],
            version=reply["version"],
            text=reply["text"],
            content=message["content"],
            tool_calls=calls,
            finish_reason=reply["finish_reason"],
            usage=Usage(**usage),
            output_ids=None if ids is None else tuple(ids),
        )


class OpenOptions(TypedDict, total=False):
    """What a session can be opened with: the fields of ``POST /v1/sessions``."""

    system: str | None
    tools: Sequence[Mapping[str, Any]]
    messages: Messages | None
    chat_template_kwargs: Mapping[str, Any] | None
    metadata: Mapping[str, str] | None


class AppendOptions(TypedDict, total=False):
    """How to append and answer: the fields of ``POST /v1/sessions/{id}/append``.

    Exactly one of messages, `text` and `input_ids` is given.
    """

    text: str | None
    input_ids: Sequence[int] | None
    sampling: Mapping[str, Any] | None
    """The server's fields: ``max_tokens``, ``temperature``, ``json_schema``, ..."""
    tool_choice: ToolChoice | None
    expected_version: int | None
    return_output_ids: bool


def open_body(options: OpenOptions) -> dict[str, Any]:
    """Body of ``POST /v1/sessions``, what is absent left out."""
    body: dict[str, Any] = {**options}
    if (messages := options.get("messages")) is not None:
        body["messages"] = message_list(messages)
    return _given({**body, "tools": list(options.get("tools") or ()) or None})


def append_body(
    messages: Messages | None, options: AppendOptions, *, stream: bool
) -> dict[str, Any]:
    """Body of an append, what is absent left out."""
    body: dict[str, Any] = {**options}
    if messages is not None:
        body["messages"] = message_list(messages)
    if (ids := options.get("input_ids")) is not None:
        body["input_ids"] = list(ids)
    return _given({**body, "stream": stream or None})


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def message_list(messages: Messages) -> list[MessageParam]:
    """Messages as a list, from the forms that are handy to write."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        return [messages]
    return list(messages)
