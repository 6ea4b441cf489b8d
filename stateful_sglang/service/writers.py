"""The one writer of a session: first come, first served, each for as long as it says."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from stateful_sglang.session.errors import SessionError, TooManyRequestsError

MAX_WAITING = 64
"""Callers that may wait for one session: each holds its request's body meanwhile."""
_LONGER_S = 0.05


class WriterPlace:
    """A place that one caller holds at a time. Not thread-safe: for one event loop."""

    def __init__(self) -> None:
        self._held = False
        self._closed: SessionError | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def held(self) -> bool:
        """Whether somebody holds the place."""
        return self._held

    async def take(
        self, wait_s: float, longer: Callable[[], Awaitable[bool]] | None = None
    ) -> bool:
        """Take the place, or wait for it; False where that took longer than `wait_s` seconds.

        A caller that is cancelled while it waits has lost nothing and holds nothing.

        Args:
            wait_s: How long.
            longer: Asked after that, and from then on every moment, whether to wait on all the
                same; the caller stays where it is in line.

        Raises:
            TooManyRequestsError: As many as may wait already.
            SessionError: What the place was closed with.
        """
        if self._closed is not None:
            raise self._closed
        if not self._held and not self._waiting:
            self._held = True
            return True
        if len(self._waiting) >= MAX_WAITING:
            raise TooManyRequestsError(
                f"{len(self._waiting)} requests wait for a turn of this session", MAX_WAITING
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait({turn}, timeout=wait_s)
            while not turn.done():
                if (longer is None or not await longer()) and not turn.done():
                    self._leave(turn)
                    return False
                await asyncio.wait({turn}, timeout=_LONGER_S)
        except asyncio.CancelledError:
            self._leave(turn)
            raise
        turn.result()
        if self._closed is not None:
            self.give_back()
            raise self._closed
        return True

    def give_back(self) -> None:
        """Let the next in line have the place."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._held = False

    def close(self, error: SessionError) -> None:
        """Send everybody in line away, and all who come, with an error."""
        self._closed = error
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self.give_back()  # It was this caller's turn just when it left.
        elif turn in self._waiting:
            self._waiting.remove(turn)
