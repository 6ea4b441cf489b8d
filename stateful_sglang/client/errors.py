"""What a server answers when it can't do what was asked, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx


class ApiError(Exception):
    """The server refused or failed. `status` is HTTP's, `type` the server's stable name."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        self.status = status
        self.type = str(error.get("type", "unknown"))
        self.param: str | None = error.get("param")
        self.details = dict(error)
        self.retry_after: float | None = None
        """Seconds after which the server wants to be asked again; None where it does not say."""
        message = str(error.get("message", "the server gave no reason"))
        super().__init__(f"{message} (HTTP {status}, {self.type})")


class AccessDeniedError(ApiError):
    """The server wants a key, or another one, or does not serve this page or under this name."""


class SessionNotFoundError(ApiError):
    """No open session has this id."""


class UnknownVersionError(ApiError):
    """The session has no such version; `version` is the one it is at."""

    @property
    def version(self) -> int | None:
        """The session's version."""
        return _version(self)


class ConflictError(ApiError):
    """Another turn runs, or the session is at another version; `version` is the current one."""

    @property
    def version(self) -> int | None:
        """The session's committed version."""
        return _version(self)


class SessionBusyError(ConflictError):
    """Another turn of the session runs."""


class VersionMismatchError(ConflictError):
    """The session is at another version than expected."""


class StaleBaseError(ConflictError):
    """The model server lost the session's tokens: open a new session."""


class OtherModelError(ConflictError):
    """The session belongs to another model or chat template than the server's."""


class SessionGoneError(ApiError):
    """The session was closed or has expired; `details["state"]` says which."""


class SessionClosedError(SessionGoneError):
    """The session was closed while the turn ran."""


class PrefixNotFoundError(ApiError):
    """No prefix of this id is published."""


class PublishRefusedError(ConflictError):
    """There is no room for the prefix beside the others that are published; nothing has changed."""


class ContextLengthError(ApiError):
    """The delta does not fit; `tokens_left` would."""

    @property
    def tokens_left(self) -> int | None:
        """Most tokens that a delta of this session can have."""
        left = self.details.get("tokens_left")
        return left if isinstance(left, int) else None


class InvalidRequestError(ApiError):
    """A field can't be used; `param` names it."""


class KeyReusedError(InvalidRequestError):
    """The idempotency key belongs to another request."""


class OverloadedError(ApiError):
    """Too many sessions or requests, no room now, or about to stop: try again later."""


class ServerError(ApiError):
    """The server failed; the session is at its last committed version."""


class NotRecordedError(ServerError):
    """The change could not be recorded, on a full disk for example; nothing has changed."""


class StreamCutError(ServerError):
    """The stream ended before its turn did. The turn may have ended well all the same."""

    def __init__(self) -> None:
        super().__init__(
            502,
            {
                "type": "stream_cut",
                "message": "the stream ended before the turn; get the session for its version",
            },
        )


class StreamDivergedError(ServerError):
    """The turn was lost with its server and ran again, with another answer than was given so far.

    An append with the same `idempotency_key` returns the committed turn.
    """

    def __init__(self, key: str) -> None:
        super().__init__(
            502,
            {
                "type": "stream_diverged",
                "message": "the turn was lost and ran again with another answer than the text so "
                f"far; append with idempotency_key={key!r} to read the committed one",
            },
        )
        self.idempotency_key = key


_BY_TYPE: Mapping[str, type[ApiError]] = {
    "unauthorized": AccessDeniedError,
    "forbidden": AccessDeniedError,
    "foreign_origin": AccessDeniedError,
    "misdirected_request": AccessDeniedError,
    "session_not_found": SessionNotFoundError,
    "session_gone": SessionGoneError,
    "unknown_version": UnknownVersionError,
    "prefix_not_found": PrefixNotFoundError,
    "publish_refused": PublishRefusedError,
    "other_model": OtherModelError,
    "session_busy": SessionBusyError,
    "version_mismatch": VersionMismatchError,
    "stale_base": StaleBaseError,
    "session_conflict": ConflictError,
    "session_closed": SessionClosedError,
    "context_length_exceeded": ContextLengthError,
    "invalid_request": InvalidRequestError,
    "idempotency_key_reused": KeyReusedError,
    "body_too_large": InvalidRequestError,
    "too_many_requests": OverloadedError,
    "too_many_sessions": OverloadedError,
    "engine_unavailable": OverloadedError,
    "draining": OverloadedError,
    "turn_aborted": ServerError,
    "commit_failed": NotRecordedError,
    "journal_failed": NotRecordedError,
}


def _version(error: ApiError) -> int | None:
    version = error.details.get("version")
    return version if isinstance(version, int) else None


def error_of(status: int, body: Any) -> ApiError:
    """The exception for an error body, whoever wrote it."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        error = {"message": str(body)[:1000]}
    kind = _BY_TYPE.get(str(error.get("type")), ServerError if status >= 500 else ApiError)
    return kind(status, error)


def response_error(response: httpx.Response) -> ApiError:
    """The exception for an error response, its body read."""
    try:
        body = response.json()
    except ValueError:
        body = response.text
    error = error_of(response.status_code, body)
    after = response.headers.get("retry-after", "")
    # Its other form, a date, asks for a wait too; for how long, our own intervals say.
    error.retry_after = float(after) if after.isdigit() else 0.0 if after else None
    return error
