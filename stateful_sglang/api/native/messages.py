"""Messages and tools as a request has them: OpenAI's form, as its SDKs dump it."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from stateful_sglang.api.native.bodies import Body, JsonSchema, refusal
from stateful_sglang.api.native.message_fields import cleaned
from stateful_sglang.session.messages import Message, ToolCall


def _joined_text(value: Any) -> Any:
    """Content as text; a list of text parts, as OpenAI's clients send it, is joined."""
    if not isinstance(value, list):
        return value
    return "".join(_part_text(index, part) for index, part in enumerate(value))


def _part_text(index: int, part: Any) -> str:
    name = _TEXT_PARTS.get(part.get("type")) if isinstance(part, dict) else None
    if name is None:
        raise refusal("only parts of type 'text' are supported", f"[{index}]")
    fields, unknown = cleaned("part", part, ("type", name))
    if unknown:
        raise refusal(_unknown("a part", unknown), f"[{index}].{unknown[0]}")
    if not isinstance(fields.get(name), str):
        raise refusal(f"a {part['type']} part needs the string {name!r}", f"[{index}]")
    return str(fields[name])


def _unknown(what: str, names: list[str]) -> str:
    return f"{what} has no field {', '.join(map(repr, names))}; leave out what the model can't read"


_TEXT_PARTS = {"text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the field that holds it."""

Text = Annotated[str, BeforeValidator(_joined_text)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Dumped(Body):
    """A body that an SDK may have dumped: see `message_fields` for what is dropped."""

    _kind: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields, unknown = cleaned(cls._kind, value, cls.model_fields)
        if unknown:
            raise refusal(_unknown(f"a {cls._kind.replace('_', ' ')}", unknown), unknown[0])
        return fields


class FunctionCallBody(Dumped):
    _kind = "function"

    name: Name
    arguments: str | dict[str, Any]


class ToolCallBody(Dumped):
    _kind = "tool_call"

    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: FunctionCallBody


class MessageBody(Dumped):
    _kind = "message"

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """``developer`` is OpenAI's newer name of ``system``, and means the same here."""
    content: Text | None = None
    refusal: str | None = None
    """The answer's text where the model declined; counts where there is no content."""
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = Field(default=None, max_length=128)
    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _explain_old_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("function_call"):
            raise refusal(
                "function_call is the old form of a call: send it in tool_calls, and its result as "
                "a message of role tool",
                "function_call",
            )
        # Empty means absent where the field, if it is there, must hold something.
        empty = [name for name in ("name", "tool_call_id") if value.get(name) == ""]
        return {name: each for name, each in value.items() if name not in empty}

    @model_validator(mode="after")
    def _consistent(self) -> MessageBody:
        if self.tool_calls and self.role != "assistant":
            raise refusal("only an assistant message has tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise refusal("only a tool message has a tool_call_id")
        if self.refusal and self.role != "assistant":
            raise refusal("only an assistant message has a refusal")
        if self.content is None and self.role != "assistant":
            raise refusal(f"a message of role {self.role} needs content ('' if empty)")
        return self

    def to_message(self) -> Message:
        """As the session keeps it; arguments that are not JSON stay a string."""
        calls = tuple(
            ToolCall(call.id, call.function.name, _arguments(call.function.arguments))
            for call in self.tool_calls or ()
        )
        role = "system" if self.role == "developer" else self.role
        text = self.content or self.refusal or ""
        return Message(role, text, calls, self.tool_call_id, self.name)


def _arguments(arguments: str | dict[str, Any]) -> Any:
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}  # What some servers write for a call without arguments.
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class FunctionBody(Body):
    name: Name
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class ToolBody(Dumped):
    _kind = "tool"

    type: Literal["function"] = "function"
    function: FunctionBody
