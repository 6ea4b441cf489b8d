"""Routes that change nothing."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from stateful_sglang.api.native.forms import list_form, messages_form, session_form
from stateful_sglang.api.native.requests import Serving
from stateful_sglang.api.streaming import EventStream, SessionEvents
from stateful_sglang.service.commands import ListSessions
from stateful_sglang.session.bounds import PAGE, VERSION
from stateful_sglang.session.errors import InvalidInputError

Limit = Annotated[int, Query(**PAGE.field())]
State = Literal["open", "closed", "expired", "any"]


def add_routes(router: APIRouter, serving: Serving) -> None:
    """Lists, a session, its messages, its events, its export, the tree."""
    service = serving.service

    @router.get("/sessions")
    async def list_sessions(
        request: Request,
        limit: Limit = 100,
        after: Annotated[str | None, Query(max_length=64)] = None,
        state: State = "open",
        metadata: Annotated[list[str] | None, Query(max_length=16)] = None,
    ) -> JSONResponse:
        """One's own sessions, the last used first."""
        asked = ListSessions(
            limit, after, _pairs(metadata or []), None if state == "any" else state
        )
        return JSONResponse(list_form(await service.list(serving.caller_of(request), asked)))

    @router.get("/sessions/{session_id}")
    async def get_session(session_id: str, request: Request) -> JSONResponse:
        """A session as last committed."""
        return JSONResponse(session_form(await service.get(serving.caller_of(request), session_id)))

    @router.get("/sessions/{session_id}/messages")
    async def messages(
        session_id: str,
        request: Request,
        version: Annotated[int | None, Query(**VERSION.field())] = None,
    ) -> JSONResponse:
        """The messages of a version, so that a lost reply can be read."""
        caller = serving.caller_of(request)
        return JSONResponse(messages_form(await service.messages(caller, session_id, version)))

    @router.get("/sessions/{session_id}/events")
    async def events(session_id: str, request: Request) -> Response:
        """What happens to a session from now on, as server-sent events."""
        caller = serving.caller_of(request)
        stream = service.events(caller, session_id)
        first = await anext(stream)  # what is wrong with the request is raised here
        events = SessionEvents(stream)
        return EventStream(events.after(first), events.leave)

    @router.get("/sessions/{session_id}/export")
    async def export(session_id: str, request: Request) -> JSONResponse:
        """A session with all its versions, to be imported by another server."""
        exported = await service.export(serving.caller_of(request), session_id)
        return await asyncio.to_thread(JSONResponse, exported)

    @router.get("/tree")
    async def tree(
        request: Request, session_id: str | None = None, limit: Limit = 100
    ) -> JSONResponse:
        """The prefix tree, or one session's path in it."""
        return JSONResponse(await service.tree(serving.caller_of(request), session_id, limit))


def _pairs(given: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for each in given:
        key, colon, value = each.partition(":")
        if not colon:
            raise InvalidInputError("metadata", "expected key:value, as in metadata=project:docs")
        pairs[key] = value
    return pairs
