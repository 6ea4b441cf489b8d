"""Chat messages as data, and their plain-text form for templates that know no tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call the assistant made."""

    id: str
    name: str
    arguments: Any
    """Parsed JSON, normally an object."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation, text only."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    raw: str | None = None
    """Assistant only: the text exactly as generated, special tokens and tool calls included, the
    end token left out. None where a client wrote the message."""
    tokens: frozenset[str] = frozenset()
    """Assistant only: spellings in `raw` that the model wrote as special or added tokens; every
    other one is text that looks like a token."""


@dataclass(frozen=True)
class Head:
    """What stands before the first message and never changes within a session."""

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI form: ``{"type": "function", "function": {"name": ..., "parameters": ...}}``."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    verbatim: bool = False
    """The template gets tools, calls and results as they are, whether or not it knows what they
    are, as SGLang's own routes have it; else in the form that comes nearest to what it knows."""

    @cached_property
    def key(self) -> str:
        """Digest of the whole head: heads with equal keys render equally."""
        values = [self.system, list(self.tools), dict(self.template_kwargs)]
        parts = json.dumps([*values, True] if self.verbatim else values)
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()

    def tool_names(self) -> list[str]:
        """Names of the functions, in the order given."""
        return [tool["function"]["name"] for tool in self.tools]


def native_form(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates with tool support expect them.

    Arguments of calls are objects, not JSON strings: templates serialise them themselves.
    """
    return [_native(message) for message in messages]


def _native(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    elif message.role == "assistant" and message.raw is not None:
        out["content"] = message.raw
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        out["name"] = message.name
    return out


def plain_form(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a template that knows only roles and text.

    Calls become ``<tool_call>`` blocks, and neighbouring tool results one user message of
    ``<tool_response>`` blocks, the form of Hermes, Qwen 2.5 and SmolLM2.
    """
    out: list[dict[str, Any]] = []
    responses: list[str] = []
    for message in messages:
        if message.role == "tool":
            responses.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        _flush(responses, out)
        out.append({"role": message.role, "content": _plain_content(message)})
    _flush(responses, out)
    return out


def _flush(responses: list[str], out: list[dict[str, Any]]) -> None:
    if responses:
        out.append({"role": "user", "content": "\n".join(responses)})
        responses.clear()


def _plain_content(message: Message) -> str:
    if message.raw is not None:
        return message.raw
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in message.tool_calls
    ]
    return "\n".join([message.content, *calls] if message.content else calls)


def tool_prompt(tools: Iterable[Mapping[str, Any]]) -> str:
    """Tool definitions as a system prompt in the Hermes form that SmolLM2 was trained on too."""
    definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{definitions}\n</tools>\n\n"
        "For each function call, return a JSON object with the function name and its arguments "
        "within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
    )
