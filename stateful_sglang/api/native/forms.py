"""Results of the service as the JSON of our routes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stateful_sglang.service.results import Closed, SessionList, SessionView, TurnResult
from stateful_sglang.service.tool_calls import openai_form


def session_form(view: SessionView) -> dict[str, Any]:
    """A session."""
    return asdict(view) | {"tools": list(view.tools)}


def list_form(found: SessionList) -> dict[str, Any]:
    """A list of sessions."""
    return {"sessions": [session_form(each) for each in found.sessions], "total": found.total}


def closed_form(closed: Closed) -> dict[str, Any]:
    """A session that was closed."""
    return {"id": closed.id, "version": closed.version, "closed": True}


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
