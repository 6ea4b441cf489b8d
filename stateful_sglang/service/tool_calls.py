"""Tool calls found in what a model wrote."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stateful_sglang.session.messages import Head, ToolCall

_ID_LETTERS = string.ascii_letters + string.digits
_HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class ParsedAnswer(NamedTuple):
    """An answer's text without its calls, and the calls."""

    content: str
    calls: tuple[ToolCall, ...]


def parse_json_call(text: str, head: Head) -> ParsedAnswer:
    """The call that a JSON constraint produced; no call where the JSON is another thing."""
    call = _call_from(text, head)
    return ParsedAnswer("", (call,)) if call else ParsedAnswer(text, ())


def parse_hermes_calls(text: str, head: Head) -> ParsedAnswer:
    """Calls in ``<tool_call>`` blocks. A block that is no call of a known tool stays text."""
    calls: list[ToolCall] = []

    def take(block: re.Match[str]) -> str:
        call = _call_from(block[1], head)
        if call is None:
            return block[0]
        calls.append(call)
        return ""

    content = _HERMES_CALL.sub(take, text)
    return ParsedAnswer(content.strip() if calls else text, tuple(calls))


def openai_form(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as OpenAI's clients expect them: arguments are JSON text."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments
                if isinstance(call.arguments, str)
                else json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for call in calls
    ]


def _call_from(text: str, head: Head) -> ToolCall | None:
    call = loaded(text)
    if not isinstance(call, Mapping) or call.get("name") not in head.tool_names():
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = loaded(arguments)
    if not isinstance(arguments, Mapping):
        return None
    return ToolCall(new_id(), call["name"], dict(arguments))


def loaded(text: str) -> Any:
    """Parsed JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def new_id() -> str:
    """An id for a call that the model gave none."""
    # Nine alphanumerics: Mistral's templates refuse every other form.
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))
