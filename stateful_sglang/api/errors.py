"""From what went wrong to a status and a body, ``{"error": {"type", "message", "param"?}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from stateful_sglang.session import errors

STATUS: Mapping[str, int] = {
    "session_not_found": 404,
    "unknown_version": 404,
    "prefix_not_found": 404,
    "publish_refused": 409,
    "other_model": 409,
    "session_busy": 409,
    "session_conflict": 409,
    "stale_base": 409,
    "version_mismatch": 409,
    "session_closed": 410,
    "session_gone": 410,
    "body_too_large": 413,
    "context_length_exceeded": 413,
    "idempotency_key_reused": 422,
    "invalid_request": 422,
    "too_many_requests": 429,
    "too_many_sessions": 429,
    "engine_error": 500,
    "draining": 503,
    "engine_unavailable": 503,
    "turn_aborted": 503,
    "commit_failed": 507,
    "journal_failed": 507,
}
"""HTTP status of each kind of error; the one place that knows both."""
RETRY_AFTER_S: Mapping[int, int] = {429: 1, 503: 1}
"""Seconds after which the same request may fare better, by status."""
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


def status_of(error: errors.SessionError) -> int:
    """HTTP status of an error."""
    return STATUS.get(error.kind, 500)


def body_of(error: errors.SessionError) -> dict[str, Any]:
    """Body of an error, also sent as the data of an ``error`` event."""
    return {"error": {"type": error.kind, "message": error.message, **error.details}}


def response_of(error: errors.SessionError) -> JSONResponse:
    """The error as a whole response."""
    status = status_of(error)
    after = RETRY_AFTER_S.get(status)
    headers = None if after is None else {"Retry-After": str(after)}
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
            # The name that a validator of ours gave may begin with an index.
            path += f".{part}" if path and not str(part).startswith("[") else str(part)
    return path
