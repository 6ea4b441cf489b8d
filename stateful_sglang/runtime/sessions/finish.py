"""How SGLang says that a request ended, in the words of the engine port. Imports no SGLang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from stateful_sglang.service.engine import EngineError, ErrorKind, Finish

_KIND_OF_TYPE: Mapping[str, ErrorKind] = {
    "busy": "busy",
    "stale_base": "stale_base",
    "broken": "broken",
}
"""What our ranks write into ``err_type``; SGLang's own types say less than its status."""
_KIND_OF_STATUS: Mapping[int, ErrorKind] = {
    HTTPStatus.BAD_REQUEST: "invalid",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded",
}
_REFUSED_CONSTRAINT = re.compile(
    r"Failed to compile \w+ grammar|Grammar preprocessing timed out|Grammar-based"
)
"""How SGLang says that it is the constraint that it can't serve, with one status for all."""

_OUT_OF_MEMORY = re.compile(
    r"Out of memory even after retracting|Retraction host KV pool exhausted"
    r"|Retracted under decode memory pressure"
)
"""How SGLang says that it gave a running request up to have room, with one status for all. What
could never run, because the pool is too small for its prompt, it calls a bad request."""


def finish_of(reason: Mapping[str, Any] | None, *, constrained: bool) -> Finish | None:
    """A report's ``finish_reason``; None while the request runs.

    Args:
        constrained: Whether the request has a constraint that could be at fault.

    Raises:
        EngineError: It ended badly.
    """
    if reason is None:
        return None
    kind = reason.get("type")
    if kind == "stop":
        return Finish("stop", reason.get("matched"))
    if kind == "length":
        return Finish("length")
    if kind != "abort":
        raise EngineError("broken", f"it ended with a finish reason we don't know: {kind!r}")
    message = str(reason.get("message") or "aborted")
    raise ended_badly(
        message, reason.get("status_code"), reason.get("err_type"), constrained=constrained
    )


def ended_badly(
    message: str, status: int | None, err_type: object = None, *, constrained: bool
) -> EngineError:
    """The error for what SGLang says of a request that it gave up, or never took.

    Args:
        status: The HTTP status it suggests.
        err_type: Its own or our ranks' name of the error.
        constrained: Whether the request has a constraint that could be at fault.
    """
    if constrained and _REFUSED_CONSTRAINT.match(message):
        return EngineError("invalid", message, "constraint")
    if _OUT_OF_MEMORY.match(message):
        return EngineError("out_of_memory", message)
    by_status = _KIND_OF_STATUS.get(int(status or 0), "broken")
    return EngineError(_KIND_OF_TYPE.get(str(err_type), by_status), message)
