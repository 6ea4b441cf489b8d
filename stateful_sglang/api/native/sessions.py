"""Routes that make sessions, keep them and end them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from stateful_sglang.api.native.changes import ForkBody, ImportBody, TouchBody
from stateful_sglang.api.native.forms import closed_form, session_form
from stateful_sglang.api.native.requests import Serving, body_docs
from stateful_sglang.api.native.schemas import OpenBody
from stateful_sglang.service.commands import Caller
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.errors import InvalidInputError, SessionError
from stateful_sglang.session.records import SessionOptions

IMPORT_TIMES = 4
"""Bodies' limits that an imported session may take: it has its tokens and its messages, and those
of versions that were left."""


def add_routes(router: APIRouter, serving: Serving) -> None:
    """Open, fork, import, touch, close."""
    service = serving.service

    @router.post("/sessions", status_code=201, openapi_extra=body_docs(OpenBody))
    async def open_session(request: Request) -> JSONResponse:
        """Open a session: system prompt, tools and messages, nothing computed yet."""
        caller = serving.caller_of(request)
        body = await serving.body(request, OpenBody)
        return JSONResponse(session_form(await service.open(caller, body.to_command())), 201)

    @router.post("/sessions/import", status_code=201, openapi_extra=body_docs(ImportBody))
    async def import_session(request: Request) -> JSONResponse:
        """Open a session as another server exported it."""
        caller = serving.caller_of(request)
        asked = await serving.made_of_body(request, ImportBody, ImportBody.to_command, IMPORT_TIMES)
        try:
            view = await service.import_(
                caller,
                asked.session,
                key=asked.key,
                accept_other_model=asked.accept_other_model,
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"session.{error.param}", error.message) from error
        return JSONResponse(session_form(view), 201)

    @router.post("/sessions/{session_id}/fork", status_code=201, openapi_extra=body_docs(ForkBody))
    async def fork(session_id: str, request: Request) -> JSONResponse:
        """Open a session that shares this one's past; nothing is copied or computed."""
        caller = serving.caller_of(request)
        body = await serving.body(request, ForkBody)
        source = None
        if body.option_changes():
            source = await _options(service, caller, session_id)
        view = await service.fork(caller, session_id, body.to_command(source))
        return JSONResponse(session_form(view), 201)

    @router.post("/sessions/{session_id}/touch", openapi_extra=body_docs(TouchBody))
    async def touch(session_id: str, request: Request) -> JSONResponse:
        """Say that a session is in use, and change how it is kept."""
        caller = serving.caller_of(request)
        body = await serving.body(request, TouchBody)
        return JSONResponse(
            session_form(await service.touch(caller, session_id, body.to_command()))
        )

    @router.delete("/sessions/{session_id}")
    async def close_session(session_id: str, request: Request, erase: bool = False) -> JSONResponse:
        """Close a session; a turn that runs is aborted first."""
        caller = serving.caller_of(request)
        return JSONResponse(closed_form(await service.close(caller, session_id, erase=erase)))


async def _options(
    service: SessionService, caller: Caller, session_id: str
) -> SessionOptions | None:
    try:
        view = await service.get(caller, session_id)
    except SessionError:
        return None  # the fork says so, unless it was made before and its key is known
    return SessionOptions(view.metadata, view.ttl_s, view.retention, view.priority, view.private)
