"""The journal: what outlives a process of sessions, and what leaves its memory while idle.

Every change is recorded before it is published and answered. Each call here is one transaction;
calls of one session never overlap, those of several sessions may share a group commit. A call that
raises has changed nothing, and nothing of it is found again later, whatever the disk had taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.records import KeyedResult, PrefixRecord, SessionRecord, State

MAX_ASKED = 1024
"""Digests that are looked up at once."""


class JournalError(Exception):
    """A change could not be recorded, or a record not be read; the message says why and what to do.

    `full` where there is no room: the rest of the server goes on.
    """

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


@dataclass(frozen=True, slots=True)
class SessionQuery:
    """Which sessions to list: the last used first."""

    tenant: str
    limit: int = 100
    after: str | None = None
    """The id that the last page ended with."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Only sessions with all of these pairs."""
    state: State | None = "open"
    """None: of any state."""


class SessionPage(NamedTuple):
    """A page of a list."""

    records: list[SessionRecord]
    total: int
    """Of all pages."""


class TenantTotals(NamedTuple):
    """What a tenant has in open sessions."""

    sessions: int
    tokens: int


class JournalStats(NamedTuple):
    """How the journal is."""

    sessions: int
    """Open ones."""
    bytes: int
    """Of its files."""
    waiting: int
    """Changes handed in and not recorded yet."""
    commits: int
    """Transactions since the start, each of one or more changes."""
    changes: int
    """Since the start."""
    broken: str | None
    """Why nothing can be recorded now; None where it can."""


class Journal(Protocol):
    """Where sessions are recorded. All calls are made on one event loop, and none blocks it."""

    async def open(
        self, record: SessionRecord, history: History, keyed: KeyedResult | None = None
    ) -> None:
        """Record a new session with the whole of `history`.

        A history that was forked begins at a commit of another session, recorded already, which
        from now on is kept for both.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def append(
        self, record: SessionRecord, commit: Commit, keyed: KeyedResult | None = None
    ) -> None:
        """Record a commit that nobody has seen yet, and that the session is at it.

        What is new in it is `commit.tokens` behind `commit.base_len`, `commit.messages` and
        `commit.pending`. It is run to its end even if the client of the turn is gone.

        Args:
            record: The session as it is with the commit.
            commit: Its parent is recorded.
            keyed: The result to be found again, in the same transaction.

        Raises:
            JournalError: It was not recorded. The commit is dropped and its version goes to the
                next one.
        """
        ...

    async def update(self, record: SessionRecord, keyed: KeyedResult | None = None) -> None:
        """Record what changed without a commit: the version it is at, its options, its use.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def end(self, session_id: str, state: State, *, erase: bool = False) -> None:
        """Record that a session was closed or has expired, and drop what no fork of it needs.

        What remains is its record, for a while, so that it isn't taken for one that never was.

        Args:
            state: ``closed`` or ``expired``.
            erase: Overwrite the dropped content in the files before returning. What a fork still
                needs stays.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def keep(self, keyed: KeyedResult) -> None:
        """Record a result of what changed no session.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def result(self, tenant: str, scope: str, key: str) -> KeyedResult | None:
        """The result kept under a key; None where there is none, or its time is over."""
        ...

    async def record(self, session_id: str) -> SessionRecord | None:
        """A session's record, in any state; None for what never was, or was forgotten."""
        ...

    async def load(self, session_id: str) -> History | None:
        """An open session's history with everything in it, as it was recorded.

        Raises:
            JournalError: The file is damaged where it lies.
        """
        ...

    async def list(self, query: SessionQuery) -> SessionPage:
        """Sessions of one tenant, the last used first."""
        ...

    async def totals(self, tenant: str) -> TenantTotals:
        """What a tenant's open sessions hold."""
        ...

    async def idle(
        self, before: float, *, default_ttl_s: float | None, limit: int = 1000
    ) -> Sequence[str]:
        """Open sessions whose time to live had ended by `before`, the longest idle first.

        Args:
            before: Seconds since the epoch.
            default_ttl_s: Of sessions that name none; None: those don't expire.
        """
        ...

    async def oldest(self, tenant: str, limit: int) -> Sequence[str]:
        """A tenant's open sessions that were used longest ago."""
        ...

    async def publish(self, prefix: PrefixRecord) -> None:
        """Record that a prefix is published.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def unpublish(self, prefix_id: str) -> None:
        """Record that a prefix is published no longer; one that is not recorded is no error.

        Raises:
            JournalError: It was not recorded.
        """
        ...

    async def prefixes(self) -> Sequence[PrefixRecord]:
        """All that is published, in the order of its publication. Damaged ones are left out."""
        ...

    async def said(self, digests: Sequence[bytes]) -> Mapping[bytes, tuple[str, int]]:
        """Sessions and versions whose commits have these digests (`Commit.said`), by digest.

        A session may be over whose commit a fork still needs.

        Args:
            digests: At most `MAX_ASKED`.

        Raises:
            JournalError: It can't be asked.
        """
        ...

    def stats(self) -> JournalStats:
        """How it is now."""
        ...

    async def close(self) -> None:
        """Record what was handed in, and let go of the files. No other call may follow."""
        ...
