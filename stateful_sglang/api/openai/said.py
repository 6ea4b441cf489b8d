"""The messages of a chat request as a session keeps them, where that is all there is to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stateful_sglang.session.messages import Message, ToolCall

_ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("thinking", "reasoning")


class NotTextError(Exception):
    """The request has what a session doesn't keep; the message says which field."""


def messages_of(dumped: Sequence[Mapping[str, Any]], joiner: str) -> list[Message]:
    """Messages of SGLang's chat request, dumped.

    Args:
        dumped: In OpenAI's form.
        joiner: What the server's template format puts between parts of text.

    Raises:
        NotTextError: There is more to a message than text, calls and results.
    """
    return [_message(at, each, joiner) for at, each in enumerate(dumped)]


def _message(at: int, dumped: Mapping[str, Any], joiner: str) -> Message:
    role = dumped["role"]
    if role not in _ROLES:
        raise NotTextError(f"messages[{at}].role")
    for field in ("tools", "prefix"):
        if dumped.get(field):
            raise NotTextError(f"messages[{at}].{field}")
    calls = tuple(
        ToolCall(call.get("id") or "", function.get("name") or "", _arguments(function))
        for call in dumped.get("tool_calls") or ()
        for function in (call.get("function") or {},)
    )
    # As SGLang has it: the parts of a result are joined by blanks, whatever the template's format.
    text = _text(at, dumped.get("content"), " " if role == "tool" else joiner)
    name = dumped.get("name") if role == "tool" else None
    return Message(role, text, calls, dumped.get("tool_call_id"), name)


def _text(at: int, content: Any, joiner: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        if kind == "text":
            texts.append(str(part["text"]))
        elif kind not in _REASONING:
            raise NotTextError(f"messages[{at}].content[{number}]")
    return joiner.join(texts)


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    if not arguments.strip():
        return {}
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
