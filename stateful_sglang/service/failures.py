"""What a caller is told of an error of the engine."""

from __future__ import annotations

from collections.abc import Mapping

from stateful_sglang.service.engine import EngineError, ErrorKind
from stateful_sglang.session.errors import EngineFailedError, InvalidInputError, SessionError

_TOLD: Mapping[ErrorKind, str] = {
    "stale_base": "stale_base",
    "busy": "session_busy",
    "conflict": "session_conflict",
    "invalid": "invalid_request",
    "overloaded": "engine_unavailable",
    "out_of_memory": "engine_unavailable",
    "broken": "engine_error",
}


def turn_failed(error: EngineError, constraint: str | None) -> SessionError:
    """Why a turn was not committed.

    Args:
        constraint: The field of the caller's request that constrains the answer, if one does.
    """
    if error.field == "constraint" and constraint is not None:
        return InvalidInputError(constraint, f"the model server refuses it: {error.message}")
    failed = EngineFailedError(
        f"the model server ended this turn: {error.message}; nothing was committed",
        _TOLD[error.kind],
    )
    failed.__cause__ = error
    return failed


def not_done(error: EngineError) -> SessionError:
    """Why a question was not answered."""
    return EngineFailedError(error.message, _TOLD[error.kind])
