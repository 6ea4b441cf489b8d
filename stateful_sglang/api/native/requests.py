"""From a request to a command: bodies and queries read, errors answered in our form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from stateful_sglang.api.errors import BodyTooLargeError, from_validation, response_of
from stateful_sglang.api.native.bodies import Body
from stateful_sglang.api.streaming import CLIENT_LEFT, ClientLeftError
from stateful_sglang.service.commands import Caller
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.errors import SessionError

BodyT = TypeVar("BodyT", bound=Body)
T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_LARGE_BODY = 1 << 16
"""Bytes from which validating takes a millisecond, or with many small messages many more."""


@dataclass(frozen=True)
class Serving:
    """What the routes serve, and to whom."""

    service: SessionService
    caller_of: Callable[[Request], Caller]

    async def body(self, request: Request, model: type[BodyT], times: int = 1) -> BodyT:
        """The body, read up to `times` the service's limit and validated in one parse."""
        return await self.made_of_body(request, model, lambda body: body, times)

    async def made_of_body(
        self, request: Request, model: type[BodyT], make: Callable[[BodyT], T], times: int = 1
    ) -> T:
        """What `make` makes of the body; a large one is validated, used and freed by a thread."""

        def read(data: bytes) -> T:
            return make(model.model_validate_json(data))

        limit = times * self.service.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLargeError(limit)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise BodyTooLargeError(limit)
        if len(data) < _LARGE_BODY:
            return read(bytes(data))
        return await asyncio.to_thread(read, bytes(data))


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
            except ClientLeftError:
                return Response(status_code=CLIENT_LEFT)

        return handle


def body_docs(model: type[Body]) -> dict[str, Any]:
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
