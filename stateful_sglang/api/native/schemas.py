"""Bodies of requests that open a session and ask for answers. Names are OpenAI's where it has the
thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from stateful_sglang.api.native.bodies import Body, refusal
from stateful_sglang.api.native.messages import MessageBody, Text, ToolBody
from stateful_sglang.api.native.sampling import SamplingBody
from stateful_sglang.api.native.writing import KeyedBody, WritingBody
from stateful_sglang.rendering.templates import RESERVED_KWARGS
from stateful_sglang.service.commands import Append, NewMessages, NewText, NewTokens, OpenSession
from stateful_sglang.session.bounds import REQUEST, TTL_S
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import Retention, SessionOptions

Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]
PRIORITY = REQUEST["priority"]


def check_head(tools: Sequence[ToolBody], template_kwargs: dict[str, Any]) -> None:
    """Prove that a head can be used.

    Raises:
        PydanticCustomError: It can't; for validators.
    """
    names = [tool.function.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise refusal(f"defined twice: {sorted(twice)}", "tools")
    if reserved := RESERVED_KWARGS & template_kwargs.keys():
        raise refusal(f"not settable: {sorted(reserved)}", "chat_template_kwargs")


def head_of(system: str | None, tools: Sequence[ToolBody], template_kwargs: dict[str, Any]) -> Head:
    """What stands before the first message, from what `check_head` let through."""
    forms = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    return Head(system, forms, template_kwargs)


class OptionsBody(Body):
    """How a session is kept."""

    metadata: Metadata = Field(default_factory=dict)
    ttl_s: float | None = Field(default=None, **TTL_S.field())
    retention: Retention = "soft"
    priority: int = Field(default=0, **PRIORITY.field())
    private: bool = False

    def to_options(self) -> SessionOptions:
        """As the service takes it."""
        return SessionOptions(
            self.metadata, self.ttl_s, self.retention, self.priority, self.private
        )


class OpenBody(OptionsBody, KeyedBody):
    """``POST /v1/sessions``: nothing is computed yet."""

    operation: ClassVar[str] = "open"

    system: Text | None = Field(default=None, min_length=1)
    tools: list[ToolBody] = Field(default_factory=list, max_length=1024)
    messages: list[MessageBody] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> OpenBody:
        check_head(self.tools, self.chat_template_kwargs)
        if (
            self.system is not None
            and self.messages
            and self.messages[0].role
            in (
                "system",
                "developer",
            )
        ):
            raise refusal("messages begin with a system message too", "system")
        return self

    def to_head(self) -> Head:
        """What stands before the first message."""
        return head_of(self.system, self.tools, self.chat_template_kwargs)

    def to_command(self) -> OpenSession:
        """As the service takes it."""
        return OpenSession(self.to_head(), kept(self.messages), self.to_options(), self.to_key())


class AnswerBody(WritingBody):
    """How to answer, whatever is new."""

    sampling: SamplingBody = Field(default_factory=SamplingBody)
    tool_choice: Literal["auto", "none", "required"] = "auto"
    stream: bool = False
    return_output_ids: bool = False
    ephemeral: bool = False
    detach: bool = False

    @model_validator(mode="after")
    def _one_schema(self) -> AnswerBody:
        if self.tool_choice == "required" and self.sampling.constraints():
            raise refusal("'required' sets the output's schema; sampling may not", "tool_choice")
        return self

    def to_command(self) -> Append:
        """As the service takes it.

        Raises:
            InvalidInputError: A schema can't be written as JSON again.
        """
        return Append(
            content=self._content(),
            sampling=self.sampling.to_sampling(),
            constraint=self.sampling.to_constraint(),
            tool_choice=self.tool_choice,
            stream=self.stream,
            writing=self.to_writing(),
            ephemeral=self.ephemeral,
            detach=self.detach,
        )

    def _content(self) -> NewMessages | NewText | NewTokens:
        raise NotImplementedError


class GenerateBody(AnswerBody):
    """``POST /v1/sessions/{id}/generate``: answer what is there."""

    operation: ClassVar[str] = "generate"

    def _content(self) -> NewMessages:
        return NewMessages(())


_CONTENT = ("messages", "text", "input_ids")


class AppendBody(AnswerBody):
    """``POST /v1/sessions/{id}/append``: what is new, and how to answer it."""

    operation: ClassVar[str] = "append"

    messages: list[MessageBody] | None = Field(default=None, min_length=1)
    text: str | None = Field(default=None, min_length=1)
    input_ids: list[int] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_content(self) -> AppendBody:
        given = [name for name in _CONTENT if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"not {' and '.join(given)}" if given else "none was given"
            raise refusal(
                f"exactly one of messages, text and input_ids is needed: {what}",
                ", ".join(given or ["messages"]),
            )
        return self

    def _content(self) -> NewMessages | NewText | NewTokens:
        if self.messages is not None:
            return NewMessages(kept(self.messages))
        return NewText(self.text) if self.text is not None else NewTokens(self.input_ids or ())


def kept(messages: list[MessageBody]) -> tuple[Message, ...]:
    """Messages as a session keeps them."""
    return tuple(message.to_message() for message in messages)
