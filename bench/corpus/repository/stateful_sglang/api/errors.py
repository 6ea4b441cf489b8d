"""From what went wrong to a status and a body, ``{"error": {"type", "message", "param"?}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from stateful_sglang.session import errors

_STATUS: Mapping[type[errors.SessionError], int] = {
    errors.SessionNotFoundError: 404,
    errors.SessionBusyError: 409,
    errors.VersionMismatchError: 409,
    errors.SessionClosedError: 410,
    errors.ContextOverflowError: 413,
    errors.InvalidInputError: 422,
    errors.TooManySessionsError: 429,
    errors.TurnAbortedError: 503,
}
_UNION_TAGS = frozenset({"str", "list[str]", "list[constrained-str]", "constrained-str"})
"""What pydantic adds to a location: the member of a union that it tried."""


class BodyTooLargeError(errors.SessionError):
    """The request body passes the limit."""

    kind = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the request body is larger than {limit} bytes, the most this server reads",
            max_bytes=limit,
        )


class EngineError(errors.SessionError):
    """The model server gave the turn up; nothing was committed."""

    kind = "engine_error"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(f"the model server ended this turn: {message}; nothing was committed")
        self.status = status
        if status == 422:
            self.kind = "invalid_request"
        elif status == 503:
            self.kind = "engine_unavailable"


def status_of(error: errors.SessionError) -> int:
    """HTTP status of an error."""
    if isinstance(error, EngineError):
        return error.status
    if isinstance(error, BodyTooLargeError):
        return 413
    return next(
        (status for kind, status in _STATUS.items() if isinstance(error, kind)),
        500,
    )


def body_of(error: errors.SessionError) -> dict[str, Any]:
    """Body of an error, also sent as the data of an ``error`` event."""
    return {"error": {"type": error.kind, "message": error.message, **error.details}}


def response_of(error: errors.SessionError) -> JSONResponse:
    """The error as a whole response."""
    status = status_of(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(body_of(error), status, headers)


def from_validation(problems: Sequence[Mapping[str, Any]]) -> errors.InvalidInputError:
    """The first of pydantic's complaints, naming the field as a caller wrote it."""
    problem = problems[0]
    loc = [part for part in problem.get("loc", ()) if part not in ("body", "query", "path")]
    if problem.get("type") == "json_invalid":
        return errors.InvalidInputError("body", f"malformed JSON: {problem['msg']}")
    path = _path([*loc, *filter(None, [problem.get("ctx", {}).get("param")])])
    return errors.InvalidInputError(path or "body", str(problem["msg"]))


def _path(loc: Sequence[Any]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_TAGS:
            path += f".{part}" if path else str(part)
    return path
