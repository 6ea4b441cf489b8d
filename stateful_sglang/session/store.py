"""Sessions as the API process holds them: versions, transcripts, and one writer at a time."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stateful_sglang.session.errors import (
    SessionBusyError,
    SessionNotFoundError,
    TooManySessionsError,
    VersionMismatchError,
)
from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.transcript import Transcript
from stateful_sglang.session.turn import PlannedTurn


@dataclass
class Session:
    """One conversation. Only `SessionStore` changes what is committed."""

    id: str
    history: History
    metadata: Mapping[str, str]
    busy: bool = False
    held_len: int = 0
    """Tokens of the tip that every rank is sure to hold: fewer than are committed after a turn that
    rewound and then did not commit."""
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)

    @property
    def tip(self) -> Commit:
        """The session as last committed."""
        return self.history.tip

    @property
    def version(self) -> int:
        """The number of that commit."""
        return self.history.tip.version


class SessionStore:
    """All open sessions. Not thread-safe: the server's event loop is its only caller."""

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def open(self, head: Head, messages: Iterable[Message], metadata: Mapping[str, str]) -> Session:
        """Add a session at version 0 under an id that can't be guessed.

        Raises:
            TooManySessionsError: The limit is reached.
        """
        return self._add(History.opened(head, messages), metadata)

    def get(self, session_id: str) -> Session:
        """The session, or `SessionNotFoundError`."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def check_writable(self, session: Session, expected_version: int | None) -> None:
        """Raise where a turn may not start now: 409 with the current version either way."""
        if session.busy:
            raise SessionBusyError(session.version)
        if expected_version is not None and expected_version != session.version:
            raise VersionMismatchError(expected_version, session.version)

    def begin(self, session: Session, plan: PlannedTurn) -> tuple[int, array[int]]:
        """Make the turn the session's one writer.

        Returns:
            ``base_len`` and delta (typecode 'q') as the ranks need them: where a rank may have
            lost tokens to an earlier turn, they come again with the delta.
        """
        self.check_writable(session, None)
        session.busy = True
        base_len = min(plan.base_len, session.held_len)
        session.held_len = base_len
        return base_len, session.tip.transcript.wide(base_len, plan.base_len) + plan.delta

    def prepare(
        self,
        session: Session,
        plan: PlannedTurn,
        output_ids: Sequence[int],
        answer: Message,
        finish_reason: str,
    ) -> Commit:
        """What the session is to be after the turn; nothing of it is seen before `publish`."""
        return session.history.prepare(
            base_len=plan.base_len,
            tokens=[*plan.delta, *output_ids],
            head=plan.head,
            messages=None if plan.messages is None else [*plan.messages, answer],
            finish_reason=finish_reason,
        )

    def publish(self, session: Session, commit: Commit) -> None:
        """Make a prepared commit the session's version. The ranks hold its tokens already."""
        session.history.publish(commit)
        session.held_len = len(commit.transcript)
        session.updated_at = time.time()

    def release(self, session: Session) -> None:
        """End the session's turn, committed or not."""
        session.busy = False

    def rollback(self, session: Session, version: int) -> None:
        """Take a session back to one of its versions. The next turn tells the ranks.

        Raises:
            SessionBusyError: A turn runs.
            UnknownVersionError: The session has no such version.
        """
        self.check_writable(session, None)
        before = session.tip.transcript
        session.history.rollback(version)
        session.held_len = _shared(session.held_len, before, session.tip.transcript)
        session.updated_at = time.time()

    def fork(self, source: Session, version: int) -> Session:
        """Add a session that shares another's past up to a version, while the other may run.

        Its `held_len` is what a rank can share as well: the ranks are to be told to fork the source
        at that length before the new session's first turn.

        Raises:
            TooManySessionsError: The limit is reached.
            UnknownVersionError: The source has no such version.
        """
        session = self._add(source.history.fork(version), source.metadata)
        session.held_len = _shared(source.held_len, source.tip.transcript, session.tip.transcript)
        return session

    def remove(self, session_id: str) -> Session:
        """Forget a session and return it, or raise `SessionNotFoundError`."""
        session = self.get(session_id)
        del self._sessions[session_id]
        return session

    def _add(self, history: History, metadata: Mapping[str, str]) -> Session:
        if len(self._sessions) >= self._max_sessions:
            raise TooManySessionsError(self._max_sessions)
        session = Session(secrets.token_urlsafe(18), history, dict(metadata))
        self._sessions[session.id] = session
        return session


def _shared(held_len: int, before: Transcript, after: Transcript) -> int:
    """Tokens of `after` that a rank holds which held `held_len` tokens of `before`."""
    return min(held_len, before.common_prefix(after))
