"""Operations under an idempotency key: whatever is asked again is answered with what it gave.

Three places know a key: what runs now, to be joined; the journal, which has the results of a day;
and nobody, so that the operation runs. A key belongs to a tenant and a session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from stateful_sglang.service.commands import Key
from stateful_sglang.session.errors import KeyReusedError
from stateful_sglang.session.journal.base import Journal
from stateful_sglang.session.records import KeyedResult

T = TypeVar("T")


class Scope(NamedTuple):
    """Where a key means something."""

    tenant: str
    session_id: str
    """Empty for what makes a session."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Makes the record of a result, to be written in the transaction of the change itself."""

    scope: Scope
    key: Key | None

    def result(self, result: Mapping[str, Any]) -> KeyedResult | None:
        """The record; None where no key was given."""
        if self.key is None:
            return None
        tenant, session_id = self.scope
        return KeyedResult(tenant, session_id, self.key.key, self.key.digest, result, time.time())


@dataclass(eq=False, slots=True)
class _Started(Generic[T]):
    digest: str
    value: asyncio.Future[T]


class KeyedWork(Generic[T]):
    """What was started under a key and isn't over; values of one kind."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._started: dict[tuple[Scope, str], _Started[T]] = {}

    async def join(self, keeping: Keeping) -> T | KeyedResult | None:
        """What runs under the key, else the result that is kept; None: nobody knew the key, and it
        is the caller's now, who has to `start` before it waits for anything.

        Raises:
            KeyReusedError: The key is known with another request.
        """
        assert keeping.key is not None
        at = (keeping.scope, keeping.key.key)
        while True:
            started = self._started.get(at)
            if started is not None:
                if started.digest != keeping.key.digest:
                    raise KeyReusedError
                try:
                    return await asyncio.shield(started.value)
                except asyncio.CancelledError:
                    if not started.value.cancelled():
                        raise  # it is this caller that is gone
                    continue  # who started it was gone before it ran: begin anew
            kept = await self._journal.result(*keeping.scope, keeping.key.key)
            if kept is not None:
                if kept.digest != keeping.key.digest:
                    raise KeyReusedError
                return kept
            if at not in self._started:
                value: asyncio.Future[T] = asyncio.get_running_loop().create_future()
                self._started[at] = _Started(keeping.key.digest, value)
                return None

    async def start(self, keeping: Keeping, run: Callable[[], Awaitable[T]]) -> T:
        """Run under a key that is the caller's; who joins gets the same value or error.

        What is joined lasts until `over`.
        """
        assert keeping.key is not None
        at = (keeping.scope, keeping.key.key)
        started = self._started[at]
        try:
            result = await run()
        except BaseException as error:
            if self._started.get(at) is started:
                del self._started[at]
            if isinstance(error, asyncio.CancelledError):
                started.value.cancel()
            else:
                started.value.set_exception(error)
                started.value.exception()  # nobody may have joined
            raise
        started.value.set_result(result)
        return result

    def over(self, keeping: Keeping) -> None:
        """What ran under the key has ended: from now on its kept result answers, if it has one."""
        if keeping.key is not None:
            self._started.pop((keeping.scope, keeping.key.key), None)
