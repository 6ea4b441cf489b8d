"""What goes to the server and what comes back, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict
from urllib.parse import quote

from stateful_sglang.service.results import Usage
from stateful_sglang.session.records import Retention

MessageParam = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, as OpenAI's clients write it."""
Messages = str | MessageParam | Sequence[MessageParam]
"""A lone string is a user message."""
ToolChoice = Literal["auto", "none", "required"]
State = Literal["open", "closed", "expired", "any"]

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


@dataclass(frozen=True)
class Ingested:
    """Messages that were added without generating."""

    version: int
    """The version this made."""
    pending: int
    """Messages that the next turn will render, these included."""
    missing: tuple[str, ...]
    """Ids of calls whose results are still to come."""
    ready_tokens: int
    """Tokens of the next turn's delta whose KV is computed by now."""
    computed_tokens: int
    """Of those, the ones computed now."""

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Ingested:
        """From the server's reply; fields of newer servers are passed over."""
        given = {each.name: reply[each.name] for each in fields(cls)}
        return cls(**given | {"missing": tuple(reply["missing"])})


@dataclass(frozen=True)
class Event:
    """Something that happened to a session; the first, ``listening``, has its version."""

    name: str
    data: Mapping[str, Any]


class SessionPage(list[dict[str, Any]]):
    """A page of sessions, the last used first."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(reply["sessions"])
        self.total: int = reply["total"]
        """Sessions of all pages."""
        self.next: str | None = reply.get("next")
        """What to give as `after` for the next page; None: this is the last."""


class KeptOptions(TypedDict, total=False):
    """How a session is kept. What is left out, or None, is the server's default, or as it was."""

    metadata: Mapping[str, str] | None
    ttl_s: float | None
    """Seconds without a use after which it expires."""
    retention: Retention | None
    priority: int | None


class OpenOptions(KeptOptions, total=False):
    """What a session can be opened with: the fields of ``POST /v1/sessions``."""

    system: str | None
    tools: Sequence[Mapping[str, Any]]
    messages: Messages | None
    chat_template_kwargs: Mapping[str, Any] | None
    private: bool | None
    """Its text never feeds another session's drafts."""
    idempotency_key: str | None
    """Of one's own; without it the client makes one."""


class PublishOptions(TypedDict, total=False):
    """What is published: the fields of ``POST /v1/prefixes``, exactly one of ``system`` (with or
    without ``tools``, which may stand alone), ``text`` and ``input_ids``."""

    system: str | None
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    text: str | None
    input_ids: Sequence[int] | None
    name: str | None
    """What people call it."""


class ForkOptions(KeptOptions, total=False):
    """How to fork: the fields of ``POST /v1/sessions/{id}/fork``; what is left out is the
    source's."""

    private: bool | None
    idempotency_key: str | None


class WriteOptions(TypedDict, total=False):
    """How a request takes its turn at a session, which has one writer at a time."""

    expected_version: int | None
    """Refuse unless the session is at this version when the turn comes."""
    on_busy: Literal["wait", "fail"] | None
    wait_s: float | None
    """Seconds to wait for others' turns."""
    idempotency_key: str | None
    """Of one's own, so that another process can send the request again; without it the client
    makes one."""


class GenerateOptions(WriteOptions, total=False):
    """How to answer: the fields of ``POST /v1/sessions/{id}/generate``."""

    sampling: Mapping[str, Any] | None
    """The server's fields: ``max_tokens``, ``temperature``, ``json_schema``, ..."""
    tool_choice: ToolChoice | None
    return_output_ids: bool
    ephemeral: bool
    """Answer from the session without committing."""
    detach: bool
    """The turn goes on to its commit when the connection is lost."""


class AppendOptions(GenerateOptions, total=False):
    """How to append and answer: the fields of ``POST /v1/sessions/{id}/append``.

    Exactly one of messages, `text` and `input_ids` is given.
    """

    text: str | None
    input_ids: Sequence[int] | None


class ListOptions(TypedDict, total=False):
    """Which sessions to list."""

    limit: int
    """Most sessions of a page."""
    state: State
    metadata: Mapping[str, str]
    """Only those with all of these pairs."""


def list_query(options: ListOptions, after: str | None) -> dict[str, Any]:
    """Query of ``GET /v1/sessions``."""
    pairs = [f"{key}:{value}" for key, value in options.get("metadata", {}).items()]
    return given({**options, "metadata": pairs or None, "after": after})


def open_body(options: OpenOptions) -> dict[str, Any]:
    """Body of ``POST /v1/sessions``, what is absent left out."""
    body: dict[str, Any] = {**options}
    if (messages := options.get("messages")) is not None:
        body["messages"] = message_list(messages)
    return given({**body, "tools": list(options.get("tools") or ()) or None})


def prefix_path(prefix_id: str) -> str:
    """Of a published prefix's route."""
    return f"/v1/prefixes/{quote(prefix_id, safe='')}"


def publish_body(options: PublishOptions) -> dict[str, Any]:
    """Body of ``POST /v1/prefixes``, what is absent left out."""
    body: dict[str, Any] = {**options}
    for name in ("tools", "input_ids"):
        if (items := body.get(name)) is not None:
            body[name] = list(items)
    return given(body)


def append_body(
    messages: Messages | None, options: AppendOptions | GenerateOptions, *, stream: bool
) -> dict[str, Any]:
    """Body of an append, what is absent left out."""
    body: dict[str, Any] = {**options}
    if messages is not None:
        body["messages"] = message_list(messages)
    if (ids := body.get("input_ids")) is not None:
        body["input_ids"] = list(ids)
    return given({**body, "stream": stream or None})


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body or a query without what is None."""
    return {name: value for name, value in body.items() if value is not None}


def message_list(messages: Messages) -> list[MessageParam]:
    """Messages as a list, from the forms that are handy to write."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        return [messages]
    return list(messages)
