"""Where commits are recorded before they are published."""

from __future__ import annotations

from typing import Protocol

from stateful_sglang.session.history import Commit


class CommitLog(Protocol):
    """Records commits. A commit is published, and its turn answered, only once it is recorded."""

    async def append(self, session_id: str, commit: Commit) -> None:
        """Record a commit that nobody has seen yet; it may take as long as a disk takes.

        What is new in it is `commit.tokens` behind `commit.base_len`, and `commit.messages`. One
        call a session is under way at a time, and it is run to its end even if the client of the
        turn is gone.

        Raises:
            Exception: It was not recorded. The commit is dropped and its version goes to the next
                one, so nothing of it may be found again.
        """
        ...


class NoLog:
    """Records nothing: sessions live in memory alone."""

    async def append(self, session_id: str, commit: Commit) -> None:
        """Do nothing; the commit may be published."""
