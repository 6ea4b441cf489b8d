"""Our HTTP routes, on a router of their own: SGLang's routes and error handlers stay untouched."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from stateful_sglang.api.errors import BodyTooLargeError, from_validation, response_of
from stateful_sglang.api.native.bodies import Body
from stateful_sglang.api.native.forms import closed_form, list_form, session_form, turn_form
from stateful_sglang.api.native.schemas import AppendBody, OpenBody
from stateful_sglang.api.streaming import TurnEvents, reply_or_abort
from stateful_sglang.service.engine import TurnEngine
from stateful_sglang.service.service import Limits, SessionService
from stateful_sglang.session.errors import SessionError

_BodyT = TypeVar("_BodyT", bound=Body)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class SessionRoute(APIRoute):
    """A route whose errors have our form, whatever handlers the application has."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except SessionError as error:
                return response_of(error)
            except (RequestValidationError, ValidationError) as error:
                return response_of(from_validation(error.errors()))

        return handle


def build_router(engine: TurnEngine, limits: Limits | None = None) -> APIRouter:
    """The session routes over `engine`, to be included in the server's application."""
    service = SessionService(engine, limits)
    router = APIRouter(prefix="/v1", tags=["sessions"], route_class=SessionRoute)

    @router.post("/sessions", status_code=201, openapi_extra=_body_docs(OpenBody))
    async def open_session(request: Request) -> JSONResponse:
        """Open a session: system prompt, tools and messages, nothing computed yet."""
        body = await _body(request, OpenBody, service.max_body_bytes)
        return JSONResponse(session_form(await service.open(body.to_command())), 201)

    @router.get("/sessions")
    async def list_sessions(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JSONResponse:
        """The sessions opened last."""
        return JSONResponse(list_form(service.list(limit)))

    @router.get("/sessions/{session_id}")
    async def get_session(session_id: str) -> JSONResponse:
        """A session as last committed."""
        return JSONResponse(session_form(service.get(session_id)))

    @router.post("/sessions/{session_id}/append", openapi_extra=_body_docs(AppendBody))
    async def append(session_id: str, request: Request) -> Response:
        """Append messages, text or token ids, and generate the answer."""
        body = await _body(request, AppendBody, service.max_body_bytes)
        turn = await service.append(session_id, body.to_command())
        form = partial(turn_form, output_ids=body.return_output_ids)
        if body.stream:
            return TurnEvents(turn, form)
        return JSONResponse(form(await reply_or_abort(turn, request.receive)))

    @router.delete("/sessions/{session_id}")
    async def close_session(session_id: str) -> JSONResponse:
        """Close a session; a turn that runs is aborted first."""
        return JSONResponse(closed_form(await service.close(session_id)))

    @router.get("/tree")
    async def tree(
        session_id: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> JSONResponse:
        """The prefix tree, or one session's path in it."""
        return JSONResponse(await service.tree(session_id, limit))

    return router


async def _body(request: Request, model: type[_BodyT], limit: int) -> _BodyT:
    """The body, read up to `limit` bytes and validated in one parse."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLargeError(limit)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise BodyTooLargeError(limit)
    return model.model_validate_json(bytes(data))


def _body_docs(model: type[Body]) -> dict[str, Any]:
    """The body for the API's own documentation, where FastAPI sees no parameter for it."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].removeprefix("#/$defs/")])
        return {key: inline(value) for key, value in part.items()}

    content = {"application/json": {"schema": inline(schema)}}
    return {"requestBody": {"required": True, "content": content}}
