"""What a service of sessions tells whoever counts: figures only, never an id or a tenant."""

from __future__ import annotations

from typing import Literal, Protocol

from stateful_sglang.session.journal.base import JournalStats

Outcome = Literal["committed", "ephemeral", "aborted", "failed", "unrecorded"]
"""How a turn ended: committed; answered without a commit; given up by its caller, or with its
session; ended by an error of the engine; ended well, but the journal could not record it."""
OUTCOMES: tuple[Outcome, ...] = ("committed", "ephemeral", "aborted", "failed", "unrecorded")
Place = Literal["memory", "journal"]
"""Where an open session is: its tokens in memory, or in the journal until it is asked for."""
PLACES: tuple[Place, ...] = ("memory", "journal")
Ended = Literal["closed", "expired"]
ENDED: tuple[Ended, ...] = ("closed", "expired")


class Observer(Protocol):
    """Takes figures as they arise. Every call is on the event loop, cheap, and raises nothing."""

    def sessions(self, place: Place, count: int) -> None:
        """So many open sessions are there now."""
        ...

    def session_opened(self) -> None:
        """A session was opened: new, as a fork, or by import."""
        ...

    def session_ended(self, how: Ended) -> None:
        """A session is no more."""
        ...

    def turn_ended(
        self, outcome: Outcome, seconds: float, ttft_s: float | None, generated_tokens: int
    ) -> None:
        """A turn ended.

        Args:
            outcome: How.
            seconds: From its request's arrival, waits for other turns included.
            ttft_s: From its request's arrival to its first token; None where there was none.
            generated_tokens: Of those that reached the API process.
        """
        ...

    def waited(self, seconds: float) -> None:
        """A caller has waited for its turn at a session, whether or not it got it."""
        ...

    def journal_committed(self, changes: int, lag_s: float) -> None:
        """A transaction of the journal ended.

        Args:
            changes: How many changes it held.
            lag_s: Since the first of them was handed in.
        """
        ...

    def journal(self, stats: JournalStats) -> None:
        """How the journal is now."""
        ...

    def prefixes(self, count: int, tokens: int) -> None:
        """So many prefixes are published to all tenants now, and so many tokens of them shared."""
        ...

    def recovered(self, ttft_s: float) -> None:
        """A session that only the journal had has given its first token again, after this long."""
        ...


class NullObserver:
    """Counts nothing."""

    def sessions(self, place: Place, count: int) -> None:
        """See `Observer`, as for all of these."""

    def session_opened(self) -> None: ...

    def session_ended(self, how: Ended) -> None: ...

    def turn_ended(
        self, outcome: Outcome, seconds: float, ttft_s: float | None, generated_tokens: int
    ) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def journal_committed(self, changes: int, lag_s: float) -> None: ...

    def journal(self, stats: JournalStats) -> None: ...

    def prefixes(self, count: int, tokens: int) -> None: ...

    def recovered(self, ttft_s: float) -> None: ...
