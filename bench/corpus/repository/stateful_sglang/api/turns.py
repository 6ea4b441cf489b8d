"""A turn while it runs: a task that the session owns, watched by at most one connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from stateful_sglang.api.errors import EngineError
from stateful_sglang.session.engine import TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.session.errors import SessionError, TurnAbortedError

logger = logging.getLogger(__name__)

Reply = dict[str, Any]
_CLIENT_ERROR = 400
_UNAVAILABLE = 503


class RunningTurn:
    """Runs one turn to its commit, its abort or its error.

    `commit` is called once, with the last progress, if and only if the turn ended well; `release`
    is called once whatever happened, after which the session takes its next turn.
    """

    def __init__(
        self,
        engine: TurnEngine,
        request: TurnRequest,
        *,
        commit: Callable[[TurnProgress, float], Reply],
        release: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._request = request
        self._commit = commit
        self._reply: Reply | None = None
        self._error: SessionError = TurnAbortedError()
        self._text = ""
        self._changed = asyncio.Event()
        self._first_token_at: float | None = None
        self.aborting = False
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

    async def result(self) -> Reply:
        """The reply of the committed turn, or the error that ended it, raised."""
        await self.wait()
        if self._reply is None:
            raise self._error
        return self._reply

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
        """Begin to abort the turn, unless it has ended; `error` is what its caller is told."""
        if self.ended or self.aborting:
            return
        self.aborting = True
        if error is not None:
            self._error = error
        self._task.cancel()

    async def abort(self, error: SessionError | None = None) -> None:
        """Abort the turn and wait until the engine has let go of it."""
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
        except SessionError as error:
            self._error = error
            return
        except Exception as error:
            logger.exception("turn %s failed", self._request.rid)
            self._error = EngineError(f"{type(error).__name__}: {error}", 500)
            return
        try:
            self._reply = self._commit(_checked(last), self._first_token_at or time.perf_counter())
        except SessionError as error:
            self._error = error
        except Exception as error:
            logger.exception("turn %s could not be committed", self._request.rid)
            self._error = EngineError(f"{type(error).__name__}: {error}", 500)

    def _publish(self, progress: TurnProgress) -> None:
        if self._first_token_at is None and progress.output_ids:
            self._first_token_at = time.perf_counter()
        self._text = progress.text
        self._changed.set()


def _checked(progress: TurnProgress | None) -> TurnProgress:
    """The last progress, or why it is no end to commit."""
    finish = progress.finish if progress is not None else None
    if progress is None or finish is None:
        raise EngineError("it ended without a finish reason", 500)
    if finish.get("type") == "abort":
        status = finish.get("status_code")
        known = {_CLIENT_ERROR: 422, _UNAVAILABLE: 503}
        message = str(finish.get("message") or "aborted")
        raise EngineError(message, known.get(int(status), 500) if status is not None else 500)
    if finish.get("matched") == "NaN happened":
        # SGLang reports broken logits as a matched stop string.
        raise EngineError("the model's logits were not numbers", 500)
    return progress
