"""Our HTTP routes, on a router of their own: SGLang's routes and error handlers stay untouched."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request

from stateful_sglang.api.native import prefixes, reading, sessions, turns
from stateful_sglang.api.native.requests import Serving, SessionRoute
from stateful_sglang.service.commands import Caller
from stateful_sglang.service.service import SessionService


def _nobody_else(_: Request) -> Caller:
    return Caller()


def build_router(
    service: SessionService, caller_of: Callable[[Request], Caller] = _nobody_else
) -> APIRouter:
    """The session routes, to be included in the server's application.

    Args:
        service: What is served.
        caller_of: Whose a request is; may raise a `SessionError`. By default there is one tenant.
    """
    router = APIRouter(prefix="/v1", tags=["sessions"], route_class=SessionRoute)
    serving = Serving(service, caller_of)
    sessions.add_routes(router, serving)
    turns.add_routes(router, serving)
    reading.add_routes(router, serving)
    prefixes.add_routes(router, serving)
    return router
