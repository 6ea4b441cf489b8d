"""What goes to the server and what comes back, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from stateful_sglang.session.turn import Usage

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


def open_body(
    system: str | None,
    tools: Sequence[Mapping[str, Any]],
    messages: Messages | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Body of ``POST /v1/sessions``, what is absent left out."""
    body = {
        "system": system,
        "tools": list(tools) or None,
        "messages": None if messages is None else message_list(messages),
        "chat_template_kwargs": chat_template_kwargs,
        "metadata": metadata,
    }
    return {name: value for name, value in body.items() if value is not None}


def append_body(
    messages: Messages | None,
    text: str | None,
    input_ids: Sequence[int] | None,
    sampling: Mapping[str, Any] | None,
    tool_choice: ToolChoice | None,
    expected_version: int | None,
    return_output_ids: bool,
    stream: bool,
) -> dict[str, Any]:
    """Body of an append, what is absent left out."""
    body = {
        "messages": None if messages is None else message_list(messages),
        "text": text,
        "input_ids": None if input_ids is None else list(input_ids),
        "sampling": sampling,
        "tool_choice": tool_choice,
        "expected_version": expected_version,
        "return_output_ids": return_output_ids or None,
        "stream": stream or None,
    }
    return {name: value for name, value in body.items() if value is not None}


def message_list(messages: Messages) -> list[MessageParam]:
    """Messages as a list, from the forms that are handy to write."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        return [messages]
    return list(messages)
