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


class SessionGoneError(SessionError):
    """The session is no more: it was closed, or nobody used it for as long as it was to be kept."""

    kind = "session_gone"

    def __init__(self, state: str) -> None:
        why = "has expired" if state == "expired" else "was closed"
        super().__init__(f"this session {why}; open a new one", state=state)


class OtherModelError(SessionError):
    """The session was computed by another model or template: its tokens mean other things here."""

    kind = "other_model"

    def __init__(self, session: str, server: str) -> None:
        super().__init__(
            f"this session belongs to model {session}, and this server runs model {server} (digests"
            " of model and chat template); continue it on a server of that model, or open another "
            "session with its messages",
            model=session,
        )


class UnknownCommitError(SessionError):
    """The session has no such version."""

    kind = "unknown_version"

    def __init__(self, version: int, at: int, param: str = "version") -> None:
        super().__init__(
            f"this session has no version {version}: it is at version {at}; take one that its "
            "messages or its events named",
            version=at,
            param=param,
        )


class KeyReusedError(SessionError):
    """An idempotency key came with another request than the first time."""

    kind = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__(
            "this idempotency key was used for another request; take a new key for each request, "
            "and the same one only to send a request again",
            param="idempotency_key",
        )


class TooManyRequestsError(SessionError):
    """A tenant or a session has as much under way as it may."""

    kind = "too_many_requests"

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what}, the most is {limit}; send it again later")


class DrainingError(SessionError):
    """The server is about to stop."""

    kind = "draining"

    def __init__(self) -> None:
        super().__init__("the server is about to stop and starts no turn; send it again later")


class JournalFailedError(SessionError):
    """The journal could not record a change, or give a record back; nothing has changed."""

    kind = "journal_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; nothing has changed")


class SessionBusyError(SessionError):
    """Another turn of this session runs: a session has one writer at a time."""

    kind = "session_busy"

    def __init__(self, version: int, waited_s: float = 0) -> None:
        waited = f" after a wait of {waited_s:g} s" if waited_s else ""
        super().__init__(
            f"a turn of this session is running at version {version}{waited}; wait for it to end "
            "(on_busy and wait_s say for how long), or close its connection to abort it",
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
        super().__init__(
            f"{limit} sessions are open, the most that you may have, and all of them are running; "
            "close some"
        )


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


class PrefixNotFoundError(SessionError):
    """No published prefix has this id."""

    kind = "prefix_not_found"

    def __init__(self, prefix_id: str) -> None:
        super().__init__(f"no published prefix has the id {prefix_id[:64]!r}; list them first")


class PublishRefusedError(SessionError):
    """A prefix can't be published beside the others; nothing has changed."""

    kind = "publish_refused"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the prefix can't be published: {reason}")


class EngineFailedError(SessionError):
    """The model server did not do its part; the session is at its last version.

    Its kind says what the caller can do: ``engine_error``, ``engine_unavailable``, ``stale_base``,
    ``session_busy``, ``session_conflict`` or ``invalid_request``.
    """

    kind = "engine_error"

    def __init__(self, message: str, kind: str = kind) -> None:
        super().__init__(message)
        self.kind = kind
