"""Routes that take their turn at a session: the connection is watched while they wait and run."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from stateful_sglang.api.native.changes import EditBody, IngestBody, RollbackBody
from stateful_sglang.api.native.forms import ingested_form, session_form, turn_form
from stateful_sglang.api.native.requests import Serving, body_docs
from stateful_sglang.api.native.schemas import AnswerBody, AppendBody, GenerateBody
from stateful_sglang.api.streaming import EventStream, result_or_leave, turn_events, unless_left
from stateful_sglang.service.turns import TurnReader

REPLAYED = "Idempotent-Replayed"
"""Header of an answer that was given before, under its idempotency key."""


def add_routes(router: APIRouter, serving: Serving) -> None:
    """Append, generate, ingest, roll back, edit."""
    service = serving.service

    async def answer(session_id: str, request: Request, model: type[AnswerBody]) -> Response:
        caller = serving.caller_of(request)
        body = await serving.body(request, model)
        reader = await unless_left(
            request.receive,
            service.append(caller, session_id, body.to_command()),
            unwanted=TurnReader.leave,
        )
        form = partial(turn_form, output_ids=body.return_output_ids)
        headers = {REPLAYED: "true"} if reader.replayed else None
        if body.stream:
            return EventStream(turn_events(reader, form), reader.leave, headers)
        turn = await result_or_leave(reader, request.receive)
        return JSONResponse(form(turn), headers=headers)

    @router.post("/sessions/{session_id}/append", openapi_extra=body_docs(AppendBody))
    async def append(session_id: str, request: Request) -> Response:
        """Append messages, text or token ids, and generate the answer."""
        return await answer(session_id, request, AppendBody)

    @router.post("/sessions/{session_id}/generate", openapi_extra=body_docs(GenerateBody))
    async def generate(session_id: str, request: Request) -> Response:
        """Generate the answer to what is there, ingested messages among it."""
        return await answer(session_id, request, GenerateBody)

    @router.post("/sessions/{session_id}/ingest", openapi_extra=body_docs(IngestBody))
    async def ingest(session_id: str, request: Request) -> JSONResponse:
        """Append messages without generating; their KV is computed while the caller goes on."""
        caller = serving.caller_of(request)
        body = await serving.body(request, IngestBody)
        work = service.ingest(caller, session_id, body.to_command())
        return JSONResponse(ingested_form(await unless_left(request.receive, work)))

    @router.post("/sessions/{session_id}/rollback", openapi_extra=body_docs(RollbackBody))
    async def rollback(session_id: str, request: Request) -> JSONResponse:
        """Take a session back to one of its versions."""
        caller = serving.caller_of(request)
        body = await serving.body(request, RollbackBody)
        work = service.rollback(caller, session_id, body.to_command())
        return JSONResponse(session_form(await unless_left(request.receive, work)))

    @router.post("/sessions/{session_id}/edit", openapi_extra=body_docs(EditBody))
    async def edit(session_id: str, request: Request) -> JSONResponse:
        """Put other messages in the place of some turns, or drop them; later turns stay."""
        caller = serving.caller_of(request)
        body = await serving.body(request, EditBody)
        work = service.edit(caller, session_id, body.to_command())
        return JSONResponse(session_form(await unless_left(request.receive, work)))
