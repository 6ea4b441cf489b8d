"""What a server answers when it can't do what was asked, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """The server refused or failed. `status` is HTTP's, `type` the server's stable name."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        self.status = status
        self.type = str(error.get("type", "unknown"))
        self.param: str | None = error.get("param")
        self.details = dict(error)
        message = str(error.get("message", "the server gave no reason"))
        super().__init__(f"{message} (HTTP {status}, {self.type})")


class SessionNotFoundError(ApiError):
    """No open session has this id."""


class ConflictError(ApiError):
    """Another turn runs, or the session is at another version; `version` is the current one."""

    @property
    def version(self) -> int | None:
        """The session's committed version."""
        version = self.details.get("version")
        return version if isinstance(version, int) else None


class SessionBusyError(ConflictError):
    """Another turn of the session runs."""


class VersionMismatchError(ConflictError):
    """The session is at another version than expected."""


class StaleBaseError(ConflictError):
    """The model server lost the session's tokens: open a new session."""


class SessionClosedError(ApiError):
    """The session was closed while the turn ran."""


class ContextLengthError(ApiError):
    """The delta does not fit; `tokens_left` would."""

    @property
    def tokens_left(self) -> int | None:
        """Most tokens that a delta of this session can have."""
        left = self.details.get("tokens_left")
        return left if isinstance(left, int) else None


class InvalidRequestError(ApiError):
    """A field can't be used; `param` names it."""


class OverloadedError(ApiError):
    """Too many sessions, or no room now: try again later."""


class ServerError(ApiError):
    """The server failed; the session is at its last committed version."""


_BY_TYPE: Mapping[str, type[ApiError]] = {
    "session_not_found": SessionNotFoundError,
    "session_busy": SessionBusyError,
    "version_mismatch": VersionMismatchError,
    "stale_base": StaleBaseError,
    "session_conflict": ConflictError,
    "session_closed": SessionClosedError,
    "context_length_exceeded": ContextLengthError,
    "invalid_request": InvalidRequestError,
    "body_too_large": InvalidRequestError,
    "too_many_sessions": OverloadedError,
    "engine_unavailable": OverloadedError,
    "turn_aborted": ServerError,
}


def error_of(status: int, body: Any) -> ApiError:
    """The exception for an error body, whoever wrote it."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        error = {"message": str(body)[:1000]}
    kind = _BY_TYPE.get(str(error.get("type")), ServerError if status >= 500 else ApiError)
    return kind(status, error)
