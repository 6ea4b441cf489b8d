"""A turn while it runs: a task that the session owns, watched by at most one connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import cast

from stateful_sglang.service.engine import EngineError, TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.service.failures import turn_failed
from stateful_sglang.service.results import TurnResult
from stateful_sglang.session.errors import SessionError, TurnAbortedError

logger = logging.getLogger(__name__)


class RunningTurn:
    """Runs one turn to its commit, its abort or its error.

    `commit` is called once, with the last progress, if and only if the turn ended well. It may
    wait, and is run to its end: an abort that comes meanwhile comes too late. `release` is called
    once whatever happened, after the commit has ended; then the session takes its next turn.
    """

    def __init__(
        self,
        engine: TurnEngine,
        request: TurnRequest,
        *,
        commit: Callable[[TurnProgress, float], Awaitable[TurnResult]],
        release: Callable[[], None],
        constraint: str | None = None,
    ) -> None:
        """`constraint` names the field of the request that constrains the answer, if one does."""
        self._engine = engine
        self._request = request
        self._commit = commit
        self._constraint = constraint
        self._result: TurnResult | None = None
        self._error: SessionError = TurnAbortedError()
        self._text = ""
        self._changed = asyncio.Event()
        self._first_token_at: float | None = None
        self.aborting = False
        """Nobody waits for the turn any more: it is to end soon, by its abort or its commit."""
        self._task = asyncio.create_task(self._run(), name=f"turn {request.rid}")
        self._ended = asyncio.Event()

        def end(_: asyncio.Task[None]) -> None:
            release()
            self._ended.set()
            self._changed.set()

        # A callback, because a task cancelled before its first step never enters its own finally.
        self._task.add_done_callback(end)

    @property
    def ended(self) -> bool:
        """Whether the turn has ended, one way or another, and the session is free again."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Until the turn has ended. Cancelling this wait leaves the turn alone."""
        await self._ended.wait()

    async def result(self) -> TurnResult:
        """The committed turn, or the error that ended it, raised."""
        await self.wait()
        if self._result is None:
            raise self._error
        return self._result

    async def texts(self) -> AsyncIterator[str]:
        """New text as it is generated, until the turn has ended. For one consumer."""
        sent = 0
        while True:
            self._changed.clear()
            if len(self._text) > sent:
                text, sent = self._text[sent:], len(self._text)
                yield text
            elif self.ended:
                return
            else:
                await self._changed.wait()

    def cancel(self, error: SessionError | None = None) -> None:
        """Begin to abort the turn, unless it has ended; `error` is what its caller is told.

        A turn whose commit has begun isn't aborted any more.
        """
        if self.ended or self.aborting:
            return
        self.aborting = True
        if error is not None:
            self._error = error
        self._task.cancel()

    async def abort(self, error: SessionError | None = None) -> None:
        """Abort the turn and wait until the engine has let go of it, or its commit has ended."""
        self.cancel(error)
        await self.wait()

    async def _run(self) -> None:
        last: TurnProgress | None = None
        try:
            run = cast(AsyncGenerator[TurnProgress, None], self._engine.run(self._request))
            async with aclosing(run) as progresses:
                async for progress in progresses:
                    last = progress
                    self._publish(progress)
        except asyncio.CancelledError:
            if last is None or last.finish is None:
                raise
            # The end beat the abort: what was delivered is committed.
        except EngineError as error:
            self._error = turn_failed(error, self._constraint)
            return
        except Exception as error:
            self._error = self._broken("failed", error)
            return
        if last is None or last.finish is None:
            unknown = EngineError("broken", "it ended without a finish reason")
            self._error = turn_failed(unknown, self._constraint)
            return
        # A task of its own: a cancellation of this one, whoever sends it, must not cut it off.
        ending = asyncio.create_task(self._end(last), name=f"commit {self._request.rid}")
        while not ending.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({ending})

    async def _end(self, last: TurnProgress) -> None:
        first_token_at = self._first_token_at or time.perf_counter()
        try:
            self._result = await self._commit(last, first_token_at)
        except SessionError as error:
            self._error = error
        except Exception as error:
            self._error = self._broken("could not be committed", error)

    def _broken(self, what: str, error: Exception) -> SessionError:
        logger.exception("turn %s %s", self._request.rid, what)
        broken = EngineError("broken", f"{type(error).__name__}: {error}")
        return turn_failed(broken, self._constraint)

    def _publish(self, progress: TurnProgress) -> None:
        if self._first_token_at is None and progress.output_ids:
            self._first_token_at = time.perf_counter()
        self._text = progress.text
        self._changed.set()
