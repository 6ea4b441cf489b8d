"""SGLang's `POST /abort_request`, for requests of the caller's tenant only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from stateful_sglang import tenants

PATH = "/abort_request"


class AbortBody(BaseModel):
    """Which requests to abort."""

    rid: str | None = None
    """As the client named it, or as the server called it in its answer."""
    abort_all: bool = False


def replace_route(
    app: FastAPI, abort: Callable[[str], None], abort_all: Callable[[], None]
) -> None:
    """Serve the route in SGLang's place.

    Args:
        app: SGLang's application.
        abort: Ends a request by id, where it is of the current caller's tenant; else does nothing.
        abort_all: Ends all requests of the server.
    """
    replaced: Any
    (replaced,) = [route for route in app.router.routes if getattr(route, "path", None) == PATH]
    app.router.routes.remove(replaced)

    async def abort_request(body: AbortBody) -> Response:
        """Abort a request; where it is another tenant's, or not there, nothing happens."""
        if body.abort_all:
            if not tenants.current().admin:
                error = {
                    "type": "forbidden",
                    "message": "abort_all ends requests of all tenants and needs an "
                    "administrator's key; abort your own by their ids",
                    "param": "abort_all",
                    "code": 403,
                }
                return JSONResponse({"error": error}, 403)
            abort_all()
        elif body.rid:
            abort(body.rid)
        return Response()

    # What SGLang notes at a handler, such as who may use it under its own --admin-api-key.
    vars(abort_request).update(vars(replaced.endpoint))
    app.post(PATH)(abort_request)
