"""Results of the service as the JSON of our routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stateful_sglang.service.results import (
    Closed,
    Ingested,
    SessionList,
    SessionMessages,
    SessionView,
    TurnResult,
)
from stateful_sglang.service.tool_calls import openai_form
from stateful_sglang.session.messages import Message


def session_form(view: SessionView) -> dict[str, Any]:
    """A session."""
    origin = view.forked_from
    forked = None if origin is None else {"id": origin.owner, "version": origin.version}
    return asdict(view) | {"tools": list(view.tools), "forked_from": forked}


def list_form(found: SessionList) -> dict[str, Any]:
    """A page of sessions."""
    return {
        "sessions": [session_form(each) for each in found.sessions],
        "total": found.total,
        "next": found.next,
    }


def closed_form(closed: Closed) -> dict[str, Any]:
    """A session that was closed."""
    return {"id": closed.id, "version": closed.version, "closed": True, "erased": closed.erased}


def ingested_form(ingested: Ingested) -> dict[str, Any]:
    """What an ingest did."""
    form = asdict(ingested)
    return {"id": form.pop("session_id"), **form, "missing": list(ingested.missing)}


def messages_form(found: SessionMessages) -> dict[str, Any]:
    """The messages of a version, in the form in which they may be sent."""
    return {
        "id": found.session_id,
        "version": found.version,
        "system": found.system,
        "messages": _message_forms(found.messages),
        "pending": _message_forms(found.pending),
        "raw": found.raw,
    }


def _message_forms(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [_message_form(each) for each in messages]


def _message_form(message: Message) -> dict[str, Any]:
    form: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        form["tool_calls"] = openai_form(message.tool_calls)
    for name in ("tool_call_id", "name"):
        if (value := getattr(message, name)) is not None:
            form[name] = value
    return form


def turn_form(turn: TurnResult, *, output_ids: bool = False) -> dict[str, Any]:
    """A turn, with its generated token ids where asked for."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if turn.calls:
        message["tool_calls"] = openai_form(turn.calls)
    form = {
        "id": turn.session_id,
        "version": turn.version,
        "message": message,
        "text": turn.text,
        "finish_reason": turn.finish_reason,
        "usage": asdict(turn.usage),
    }
    return form | {"output_ids": turn.output_ids.tolist()} if output_ids else form
