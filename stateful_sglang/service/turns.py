"""A turn while it runs: a task that the session owns, read by those who asked for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Protocol, cast

from stateful_sglang.service.engine import EngineError, TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.service.failures import turn_failed
from stateful_sglang.service.results import TurnResult
from stateful_sglang.session.errors import SessionError, TurnAbortedError

logger = logging.getLogger(__name__)

_TRIES = {"out_of_memory": 30, "stale_base": 3}
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
"""A turn that the scheduler gave up to make room is sent again, for about a minute; one for which a
rank lacked tokens, with all of them, and once more where that overtook another message."""


class TurnReader(Protocol):
    """A turn as one of its callers sees it."""

    replayed: bool
    """The result was kept from before: nothing runs."""

    @property
    def ended(self) -> bool:
        """Whether the turn has ended, one way or another."""
        ...

    def texts(self) -> AsyncIterator[str]:
        """The text as it is generated, from its start, until the turn has ended."""
        ...

    def reports(self) -> AsyncIterator[Any]:
        """The turn so far in the model server's own form, whenever there is more; the last one
        when it is committed. None of a turn that did not end well, nor of one that is kept."""
        ...

    async def wait(self) -> None:
        """Until the turn has ended. Cancelling this wait leaves the turn alone."""
        ...

    async def result(self) -> TurnResult:
        """The turn's result, or the error that ended it, raised."""
        ...

    def leave(self) -> None:
        """This caller is gone. Doing it twice, or after the end, changes nothing."""
        ...


class KeptTurn:
    """A turn that ended earlier, read again by its idempotency key."""

    replayed = True
    ended = True

    def __init__(self, result: TurnResult) -> None:
        self._result = result

    async def texts(self) -> AsyncIterator[str]:
        """All of its text at once."""
        if self._result.text:
            yield self._result.text

    async def reports(self) -> AsyncIterator[Any]:
        """Nothing: what is kept is the result."""
        return
        yield  # a generator, as its caller expects

    async def wait(self) -> None:
        """Return at once."""

    async def result(self) -> TurnResult:
        """What it gave."""
        return self._result

    def leave(self) -> None:
        """Do nothing."""


class RunningTurn:
    """Runs one turn to its commit, its abort or its error.

    `commit` is called once, with the last progress, if and only if the turn ended well. It may
    wait, and is run to its end: an abort that comes meanwhile comes too late. `release` is called
    once whatever happened, after the commit has ended; then the session takes its next turn.

    The turn is aborted when its last reader has left, unless it is `detached`.
    """

    def __init__(
        self,
        engine: TurnEngine,
        request: Callable[[], TurnRequest],
        *,
        commit: Callable[[TurnProgress, float], Awaitable[TurnResult]],
        release: Callable[[SessionError | None], None],
        constraint: str | None = None,
        detached: bool = False,
        on_stale: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            engine: The model server.
            request: Makes the request of one try.
            commit: Makes the result of a turn that ended well.
            release: Told of the error that ended the turn, or None.
            constraint: The field of the caller's request that constrains the answer, if one does.
            detached: Whether the turn goes on without readers.
            on_stale: Called when a rank turned out to hold less than `request` took it to hold; the
                next `request` is to send everything.
        """
        self._engine = engine
        self._request = request
        self._commit = commit
        self._constraint = constraint
        self._detached = detached
        self._on_stale = on_stale
        self._result: TurnResult | None = None
        self._error: SessionError = TurnAbortedError()
        self._text = ""
        self._read = 0
        """Characters of the text that a reader has got: no later try may say other ones."""
        self._latest: TurnProgress | None = None
        self._watching: set[asyncio.Event] = set()
        self._readers = 0
        self._first_token_at: float | None = None
        self.generated_tokens = 0
        """Of those that reached this process."""
        self.aborting = False
        """Nobody waits for the turn any more: it is to end soon, by its abort or its commit."""
        self._task = asyncio.create_task(self._run(), name="turn")
        self._ended = asyncio.Event()
        self._on_end: list[Callable[[], None]] = []

        def end(_: asyncio.Task[None]) -> None:
            self._ended.set()
            release(None if self._result is not None else self._error)
            for told in self._on_end:
                told()
            self._wake()

        # A callback, because a task cancelled before its first step never enters its own finally.
        self._task.add_done_callback(end)

    @property
    def ended(self) -> bool:
        """Whether the turn has ended, one way or another, and the session is free again."""
        return self._ended.is_set()

    @property
    def committed(self) -> bool:
        """Whether it ended well."""
        return self.ended and self._result is not None

    def ttft_s(self, arrived: float) -> float | None:
        """Seconds from `arrived` (`time.perf_counter`) to the first token; None: there was none."""
        return None if self._first_token_at is None else self._first_token_at - arrived

    def reader(self) -> TurnReader:
        """The turn for one more caller."""
        self._readers += 1
        return _Reader(self)

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
        """The text as it is generated, from its start, until the turn has ended."""
        sent = 0
        changed = asyncio.Event()
        self._watching.add(changed)
        try:
            while True:
                changed.clear()
                if len(self._text) > sent:
                    text, sent = self._text[sent:], len(self._text)
                    self._read = max(self._read, sent)
                    yield text
                elif self.ended:
                    return
                else:
                    await changed.wait()
        finally:
            self._watching.discard(changed)

    def on_end(self, told: Callable[[], None]) -> None:
        """Have `told` called when the turn has ended, before its readers know of it."""
        if self.ended:
            told()
        else:
            self._on_end.append(told)

    async def reports(self) -> AsyncIterator[Any]:
        """See `TurnReader`."""
        seen: TurnProgress | None = None
        changed = asyncio.Event()
        self._watching.add(changed)
        try:
            while True:
                changed.clear()
                latest = self._latest
                if self.ended:
                    if self._result is not None and latest is not None:
                        yield latest.report
                    return
                # A turn that is run again comes by what was read of the last try once more.
                more = latest is not None and len(latest.text) >= self._read
                if latest is not None and more and latest is not seen and latest.finish is None:
                    seen, self._read = latest, len(latest.text)
                    yield latest.report
                else:
                    await changed.wait()
        finally:
            self._watching.discard(changed)

    def cancel(self, error: SessionError | None = None) -> None:
        """Begin to abort the turn, unless it has ended; `error` is what its callers are told.

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

    def left(self) -> None:
        """One of its readers is gone."""
        self._readers -= 1
        if not self._readers and not self._detached:
            self.cancel()

    async def _run(self) -> None:
        last: TurnProgress | None = None
        tries: Counter[str] = Counter()
        while True:
            try:
                last = await self._attempt()
                break
            except EngineError as error:
                tries[error.kind] += 1
                if tries[error.kind] >= _TRIES.get(error.kind, 1):
                    self._error = turn_failed(error, self._constraint)
                    return
                if error.kind == "stale_base":
                    self._on_stale()
                logger.info("a turn is sent again: %s", error.message)
            except Exception as error:
                self._error = self._broken("failed", error)
                return
            await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** tries.total(), _LONGEST_PAUSE_S))
        if last is None or last.finish is None:
            unknown = EngineError("broken", "it ended without a finish reason")
            self._error = turn_failed(unknown, self._constraint)
            return
        # A task of its own: a cancellation of this one, whoever sends it, must not cut it off.
        ending = asyncio.create_task(self._end(last), name="commit")
        while not ending.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({ending})

    async def _attempt(self) -> TurnProgress | None:
        last: TurnProgress | None = None
        try:
            run = cast(AsyncGenerator[TurnProgress, None], self._engine.run(self._request()))
            async with aclosing(run) as progresses:
                async for progress in progresses:
                    last = progress
                    self._publish(progress)
        except asyncio.CancelledError:
            if last is None or last.finish is None:
                raise
            # The end beat the abort: what was delivered is committed.
        return last

    async def _end(self, last: TurnProgress) -> None:
        first_token_at = self._first_token_at or time.perf_counter()
        try:
            self._result = await self._commit(last, first_token_at)
        except SessionError as error:
            self._error = error
        except Exception as error:
            self._error = self._broken("could not be committed", error)

    def _broken(self, what: str, error: Exception) -> SessionError:
        logger.exception("a turn %s", what)
        broken = EngineError("broken", f"{type(error).__name__}: {error}")
        return turn_failed(broken, self._constraint)

    def _publish(self, progress: TurnProgress) -> None:
        if self._first_token_at is None and progress.output_ids:
            self._first_token_at = time.perf_counter()
        self.generated_tokens = len(progress.output_ids)
        self._latest = progress
        read = self._text[: self._read]
        if progress.text.startswith(read):
            self._text = progress.text
        elif progress.finish is None and read.startswith(progress.text):
            self._text = read
        else:
            # Another try samples other words than those that readers have seen of the last one.
            raise EngineError(
                "overloaded",
                "the scheduler gave the turn up to make room, after some of it was read",
            )
        self._wake()

    def _wake(self) -> None:
        for changed in self._watching:
            changed.set()


class _Reader:
    """One caller's part in a running turn."""

    replayed = False

    def __init__(self, turn: RunningTurn) -> None:
        self._turn = turn
        self._here = True

    @property
    def ended(self) -> bool:
        return self._turn.ended

    def texts(self) -> AsyncIterator[str]:
        return self._turn.texts()

    def reports(self) -> AsyncIterator[Any]:
        return self._turn.reports()

    async def wait(self) -> None:
        await self._turn.wait()

    async def result(self) -> TurnResult:
        return await self._turn.result()

    def leave(self) -> None:
        if self._here:
            self._here = False
            self._turn.left()
