"""Request bodies of our routes. Names are OpenAI's where it has the thing."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from jsonschema import Draft202012Validator, SchemaError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stateful_sglang.session.messages import Head, Message, ToolCall
from stateful_sglang.session.template import RESERVED_KWARGS

MAX_STOPS = 16
"""SGLang compares every generated token with every stop string."""


def refusal(message: str, param: str = "") -> PydanticCustomError:
    """An error of a validator; `param` names the field where the location alone does not."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """Refuses unknown fields and silent conversions: a typing error is answered, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _checked_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise refusal(f"not a JSON schema: {error.message}") from error
    except RecursionError as error:
        raise refusal("the JSON schema is nested too deep") from error
    return schema


def _parsed_schema(value: Any) -> Any:
    """A schema may come as an object, or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise refusal(f"not JSON: {error}") from error


JsonSchema = Annotated[
    dict[str, Any], BeforeValidator(_parsed_schema), AfterValidator(_checked_schema)
]


def _joined_text(value: Any) -> Any:
    """Content as text; a list of text parts, as OpenAI's clients send it, is joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise refusal("only parts of type 'text' are supported")
        if not isinstance(part.get("text"), str):
            raise refusal("a text part needs the string 'text'")
        texts.append(part["text"])
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_joined_text)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionCallBody(Body):
    name: Name
    arguments: str | dict[str, Any]


class ToolCallBody(Body):
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: FunctionCallBody


class MessageBody(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = Field(default=None, max_length=128)
    name: Name | None = None

    @model_validator(mode="after")
    def _says_something(self) -> MessageBody:
        if self.tool_calls and self.role != "assistant":
            raise refusal("only an assistant message has tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise refusal("only a tool message has a tool_call_id")
        if self.role == "tool":
            if self.content is None:
                raise refusal("a tool message needs content ('' if empty)")
        elif not self.content and not self.tool_calls:
            raise refusal(f"a message of role {self.role} needs content")
        return self

    def to_message(self) -> Message:
        """As the session keeps it; arguments that are not JSON stay a string."""
        calls = tuple(
            ToolCall(call.id, call.function.name, _arguments(call.function.arguments))
            for call in self.tool_calls or ()
        )
        return Message(self.role, self.content or "", calls, self.tool_call_id, self.name)


def _arguments(arguments: str | dict[str, Any]) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class FunctionBody(Body):
    name: Name
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"] = "function"
    function: FunctionBody


class OpenBody(Body):
    """``POST /v1/sessions``: nothing is computed yet."""

    system: Text | None = Field(default=None, min_length=1)
    tools: list[ToolBody] = Field(default_factory=list, max_length=1024)
    messages: list[MessageBody] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _consistent(self) -> OpenBody:
        names = [tool.function.name for tool in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise refusal(f"defined twice: {sorted(twice)}", "tools")
        if reserved := RESERVED_KWARGS & self.chat_template_kwargs.keys():
            raise refusal(f"not settable: {sorted(reserved)}", "chat_template_kwargs")
        if self.system is not None and self.messages and self.messages[0].role == "system":
            raise refusal("messages begin with a system message too", "system")
        return self

    def to_head(self) -> Head:
        """What stands before the first message."""
        tools = tuple(tool.model_dump(exclude_none=True) for tool in self.tools)
        return Head(self.system, tools, self.chat_template_kwargs)


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("json_schema goes with type 'json_schema', and only with it")
        return self


StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class SamplingBody(Body):
    """How to generate. What is left out takes the server's default."""

    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    stop: StopText | list[StopText] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOPS)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    ignore_eos: bool | None = None
    json_schema: JsonSchema | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(default=None, min_length=1)
    ebnf: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> SamplingBody:
        if self.top_k == 0:
            raise refusal("-1 (off) or at least 1, not 0", "top_k")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise refusal(f"at most {MAX_STOPS} strings", "stop")
        if (self.min_tokens or 0) > (self.max_tokens or float("inf")):
            raise refusal("more than max_tokens", "min_tokens")
        if len(self.constraints()) > 1:
            given = ", ".join(self.constraints())
            raise refusal(f"only one constraint at a time, not {given}", given)
        return self

    def constraints(self) -> list[str]:
        """Fields given that constrain the text."""
        names = [
            name for name in ("json_schema", "regex", "ebnf") if getattr(self, name) is not None
        ]
        if self.response_format is not None and self.response_format.type != "text":
            names.append("response_format")
        return names


_CONTENT = ("messages", "text", "input_ids")


class AppendBody(Body):
    """``POST /v1/sessions/{id}/append``: what is new, and how to answer it."""

    messages: list[MessageBody] | None = Field(default=None, min_length=1)
    text: str | None = Field(default=None, min_length=1)
    input_ids: list[int] | None = Field(default=None, min_length=1)
    sampling: SamplingBody = Field(default_factory=SamplingBody)
    tool_choice: Literal["auto", "none", "required"] = "auto"
    stream: bool = False
    expected_version: int | None = Field(default=None, ge=0)
    return_output_ids: bool = False

    @model_validator(mode="after")
    def _one_content(self) -> AppendBody:
        given = [name for name in _CONTENT if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"not {' and '.join(given)}" if given else "none was given"
            raise refusal(
                f"exactly one of messages, text and input_ids is needed: {what}",
                ", ".join(given or ["messages"]),
            )
        if self.tool_choice == "required" and self.sampling.constraints():
            raise refusal("'required' sets the output's schema; sampling may not", "tool_choice")
        return self
