"""Sessions as the API process holds them: versions, transcripts, and one writer at a time."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stateful_sglang.session.conversation import Conversation
from stateful_sglang.session.errors import (
    SessionBusyError,
    SessionNotFoundError,
    TooManySessionsError,
    VersionMismatchError,
)
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.transcript import Transcript
from stateful_sglang.session.turn import PlannedTurn


@dataclass
class Session:
    """One conversation. Only `SessionStore` changes what is committed."""

    id: str
    conversation: Conversation
    pending: list[Message]
    """Messages given at opening, rendered by the first turn."""
    metadata: Mapping[str, str]
    version: int = 0
    """Committed turns."""
    transcript: Transcript = field(default_factory=Transcript)
    busy: bool = False
    held_len: int = 0
    """Tokens that every rank is sure to hold: fewer than are committed after a turn that rewound
    and then did not commit."""
    finish_reason: str | None = None
    """Of the last committed turn."""
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)


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
        if len(self._sessions) >= self._max_sessions:
            raise TooManySessionsError(self._max_sessions)
        session = Session(
            secrets.token_urlsafe(18), Conversation(head), list(messages), dict(metadata)
        )
        self._sessions[session.id] = session
        return session

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
        return base_len, array("q", session.transcript.slice(base_len, plan.base_len)) + plan.delta

    def commit(
        self,
        session: Session,
        plan: PlannedTurn,
        output_ids: Sequence[int],
        answer: Message,
        finish_reason: str,
    ) -> None:
        """Publish a turn: its tokens and messages become history, the version rises by one."""
        session.transcript.truncate(plan.base_len)
        session.transcript.extend(plan.delta)
        session.transcript.extend(output_ids)
        session.held_len = len(session.transcript)
        session.conversation.head = plan.head
        if plan.messages is None:
            session.conversation.raw = True
        else:
            session.conversation.extend([*plan.messages, answer])
            session.pending.clear()
        session.version += 1
        session.finish_reason = finish_reason
        session.updated_at = time.time()

    def release(self, session: Session) -> None:
        """End the session's turn, committed or not."""
        session.busy = False

    def remove(self, session_id: str) -> Session:
        """Forget a session and return it, or raise `SessionNotFoundError`."""
        session = self.get(session_id)
        del self._sessions[session_id]
        return session
