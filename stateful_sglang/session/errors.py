"""What can be wrong with a request, decided before the model server sees it."""

from __future__ import annotations


class SessionError(Exception):
    """Something the caller can act on. `kind` is stable; `details` go into the error body."""

    kind = "session_error"

    def __init__(self, message: str, **details: int | str | None) -> None:
        super().__init__(message)
        self.message = message
        self.details = {name: value for name, value in details.items() if value is not None}


class SessionNotFoundError(SessionError):
    """No open session has this id."""

    kind = "session_not_found"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"no open session has the id {session_id[:64]!r}; open one first")


class SessionBusyError(SessionError):
    """Another turn of this session runs: a session has one writer at a time."""

    kind = "session_busy"

    def __init__(self, version: int) -> None:
        super().__init__(
            f"a turn of this session is running at version {version}; "
            "wait for it to end, or close its connection to abort it",
            version=version,
        )


class VersionMismatchError(SessionError):
    """The caller expected another version than the one committed."""

    kind = "version_mismatch"

    def __init__(self, expected: int, version: int) -> None:
        super().__init__(
            f"expected_version is {expected} but the session is at version {version}; "
            "read the session and decide again",
            version=version,
            param="expected_version",
        )


class SessionClosedError(SessionError):
    """The session was closed while this turn ran; nothing was committed."""

    kind = "session_closed"

    def __init__(self) -> None:
        super().__init__("the session was closed while this turn ran; nothing was committed")


class TurnAbortedError(SessionError):
    """The turn was given up before it ended."""

    kind = "turn_aborted"

    def __init__(self) -> None:
        super().__init__("the turn was aborted; nothing was committed")


class CommitFailedError(SessionError):
    """The turn ended well but could not be recorded; the session is at its last version."""

    kind = "commit_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the turn ended well but could not be recorded ({reason}); nothing was committed, "
            "so it may be sent again"
        )


class TooManySessionsError(SessionError):
    """The server holds as many sessions as it may."""

    kind = "too_many_sessions"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} sessions are open, the most this server holds; close some")


class ContextOverflowError(SessionError):
    """The delta does not fit in the model's context together with one generated token."""

    kind = "context_length_exceeded"

    def __init__(self, *, delta_tokens: int, tokens_left: int, context_length: int) -> None:
        super().__init__(
            f"this append has {delta_tokens} tokens, but {tokens_left} are left of the context of "
            f"{context_length} tokens (one is kept for the answer)",
            tokens_left=tokens_left,
        )


class InvalidInputError(SessionError):
    """A field of the request holds something that can't be used."""

    kind = "invalid_request"

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message, param=param)
        self.param = param


class EngineFailedError(SessionError):
    """The model server did not do its part; the session is at its last version.

    Its kind says what the caller can do: ``engine_error``, ``engine_unavailable``, ``stale_base``,
    ``session_busy``, ``session_conflict`` or ``invalid_request``.
    """

    kind = "engine_error"

    def __init__(self, message: str, kind: str = kind) -> None:
        super().__init__(message)
        self.kind = kind
