"""Sessions that clients continue without knowing of them: found by what they say again.

A client of a stateless API sends the whole conversation with every request. Each version that such
a request made is known here by the digest of all that had been said by then (`session/said.py`).
The longest prefix of a request that is known is where its turn begins: at the end of a session it
is an append, at an earlier version or beside another turn a branch, which is a fork, and where
nothing is known it is a new session, whose first tokens are the ones that the model server's own
route renders. A digest only proposes: the messages themselves are compared before anything is built
on them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import NamedTuple

from stateful_sglang.service.appends import Appends
from stateful_sglang.service.changes import Changes
from stateful_sglang.service.commands import Append, Caller, NewMessages
from stateful_sglang.service.commits import AcceptedAppend
from stateful_sglang.service.conversations import Conversation, ImplicitTurn, Match, Reuse
from stateful_sglang.service.core import Core
from stateful_sglang.service.directory import Resident
from stateful_sglang.service.idempotency import Keeping, Scope
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.service.turns import RunningTurn
from stateful_sglang.session.errors import SessionError
from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.ids import new_session_id
from stateful_sglang.session.journal.base import MAX_ASKED, JournalError
from stateful_sglang.session.messages import Message
from stateful_sglang.session.said import (
    Difference,
    Recital,
    Said,
    canonical,
    first_difference,
)
from stateful_sglang.session.session import Session
from stateful_sglang.session.turn import PlannedTurn

logger = logging.getLogger(__name__)

MAX_KNOWN = 200_000
"""Versions that can be found, those that were used last; some 300 bytes each."""


class _Place(NamedTuple):
    session_id: str
    version: int


_Started = tuple[RunningTurn, Reuse]


class _Asked(NamedTuple):
    """A request on its way to a turn."""

    caller: Caller
    request: Conversation
    arrived: float
    """By `time.perf_counter`."""


class Implicit:
    """Finds the sessions of conversations, and runs their turns. For one event loop."""

    def __init__(self, core: Core, changes: Changes, appends: Appends) -> None:
        self._core = core
        self._changes = changes
        self._appends = appends
        self._known: OrderedDict[bytes, _Place] = OrderedDict()
        self._running: dict[tuple[str, Hashable], asyncio.Future[_Started]] = {}

    def __len__(self) -> int:
        """Versions that can be found."""
        return len(self._known)

    def knows(self, asked: Recital) -> bool:
        """Whether a conversation seems to go on from one that is known; from any thread."""
        return any(asked.chain[count] in self._known for count in asked.ends)

    async def turn(self, caller: Caller, asked: Conversation) -> ImplicitTurn:
        """Start the turn of a conversation, or join the one that a request like it started.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        self._core.check_accepting()
        start = partial(self._start, _Asked(caller, asked, time.perf_counter()))
        if asked.repeats is None:
            turn, reuse = await start()
        else:
            turn, reuse = await self._joined((caller.tenant, asked.repeats), start)
        return ImplicitTurn(turn.reader(), reuse)

    async def _joined(
        self, key: tuple[str, Hashable], start: Callable[[], Awaitable[_Started]]
    ) -> _Started:
        """What runs under a key; where nothing does, what `start` begins."""
        begun = self._running.get(key)
        if begun is not None:
            try:
                turn, reuse = await asyncio.shield(begun)
            except asyncio.CancelledError:
                if not begun.cancelled():
                    raise  # it is this caller that is gone
            else:
                if not turn.ended and not turn.aborting:
                    return turn, reuse
        begun = self._running[key] = asyncio.get_running_loop().create_future()

        def forget() -> None:
            if self._running.get(key) is begun:
                del self._running[key]

        try:
            started = await start()
        except BaseException:
            forget()
            begun.cancel()
            raise
        begun.set_result(started)
        started[0].on_end(forget)
        return started

    async def _start(self, asked: _Asked) -> _Started:
        said, chain = asked.request.recital
        for count, place in await self._places(asked.request.recital):
            try:
                async with self._core.directory.use(asked.caller, place.session_id) as resident:
                    commit = _verified(resident, place, said[:count])
                    if commit is not None:
                        self._know(chain[count], place)
                        return await self._continue(asked, resident, commit, count)
            except SessionError as error:
                # Whatever keeps the session from being continued, the request can be served anew.
                logger.info("a known conversation begins anew: %s", error.kind)
                self._known.pop(chain[count], None)
        return await self._anew(asked)

    async def _places(self, asked: Recital) -> list[tuple[int, _Place]]:
        """Where the request may have come from, the longest beginning first."""
        chain, ends = asked.chain, asked.ends
        found = [
            (count, self._known[chain[count]]) for count in ends if chain[count] in self._known
        ]
        if found or not ends:
            return found
        counts = {chain[count]: count for count in ends[:MAX_ASKED]}
        try:
            places = await self._core.journal.said(list(counts))
        except JournalError as error:
            logger.warning("conversations can't be looked up: %s", error)
            return []
        recorded = [(counts[digest], _Place(*place)) for digest, place in places.items()]
        return sorted(recorded, reverse=True)

    async def _continue(
        self, asked: _Asked, resident: Resident, commit: Commit, count: int
    ) -> _Started:
        session, divergence, writer = resident.session, None, resident.writer
        match: Match = "append"
        tip_free = commit is session.tip and not commit.pending and not writer.held
        if not tip_free or not await writer.take(0.0):
            match = "branch"
            divergence = first_difference(_said_by(session.tip), asked.request.recital.said)
            resident = await self._branch(asked, session, commit.version)
            await resident.writer.take(0.0)
        try:
            plan = await self._plan(asked.request, resident.session, count)
            return self._run(asked, resident, plan, match, count, divergence)
        except BaseException:
            resident.writer.give_back()
            if match == "branch":
                self._core.spawn(self._forget(resident.session.id, recorded=True))
            raise

    async def _plan(self, request: Conversation, session: Session, count: int) -> PlannedTurn:
        new = tuple(request.messages[count:])
        if request.exact:
            return self._core.planner.plan_whole(session, new, await request.first())
        return self._core.planner.plan(session, NewMessages(new))

    async def _branch(self, asked: _Asked, source: Session, version: int) -> Resident:
        forked = source.fork(version, asked.request.options)
        keeping = Keeping(Scope(asked.caller.tenant, ""), None)
        await self._changes.add_fork(asked.caller, source, forked, keeping)
        resident = self._core.directory.resident(forked.id)
        assert resident is not None
        return resident

    async def _anew(self, asked: _Asked) -> _Started:
        request = asked.request
        rendered = await request.first()
        plan = self._core.planner.plan_first(
            request.head, request.messages, rendered, exact=request.exact
        )
        kept = await self._has_room(asked.caller)
        session_id = new_session_id()
        history = History.opened(session_id, request.head)
        session = Session(session_id, asked.caller.tenant, history, request.options)
        resident = self._core.directory.add(session)
        if kept:
            await resident.writer.take(0.0)
        return self._run(asked, resident, plan, "new", 0, None, kept=kept)

    async def _has_room(self, caller: Caller) -> bool:
        """Whether one more session can be kept: a request is served in any case."""
        try:
            await self._changes.make_room(caller)
        except SessionError as error:
            logger.warning("a conversation is served and not kept: %s", error.message)
            return False
        return True

    def _run(
        self,
        asked: _Asked,
        resident: Resident,
        plan: PlannedTurn,
        match: Match,
        count: int,
        divergence: Difference | None,
        *,
        kept: bool = True,
    ) -> _Started:
        """Begin the turn; `kept`: there will be a session of it, and its writer's place is held."""
        session, request = resident.session, asked.request
        tip = session.tip
        sampling = self._core.planner.sampling(Sampling(), plan)
        new = NewMessages(tuple(request.messages[count:]))
        accepted = AcceptedAppend(
            resident,
            Append(new, stream=request.stream, ephemeral=not kept),
            plan,
            sampling.max_tokens or 0,
            asked.arrived,
            Keeping(Scope(asked.caller.tenant, session.id), None),
            tip.version,
            len(tip.transcript),
            request.read,
            request.recital.answered,
            unrecorded=match == "new",
        )
        turn = self._appends.begin(asked.caller, accepted, sampling, wire=request.wire)

        def ended() -> None:
            made = session.tip
            if made is not tip and made.said is not None:
                self._know(made.said, _Place(session.id, made.version))
                if match == "new":
                    self._core.observer.session_opened()
            elif match != "append":
                self._core.spawn(self._forget(session.id, recorded=match == "branch"))

        turn.on_end(ended)
        reuse = Reuse(
            match, session.id, tip.version, len(tip.transcript), len(plan.delta), count, divergence
        )
        return turn, reuse

    async def _forget(self, session_id: str, *, recorded: bool) -> None:
        """Leave nothing of a session whose only turn came to nothing."""
        if recorded:
            await self._core.directory.end(session_id, "closed")
            self._core.observer.session_ended("closed")
        else:
            self._core.directory.drop(session_id)
            await self._core.engine.close_session(session_id)

    def _know(self, digest: bytes, place: _Place) -> None:
        self._known[digest] = place
        self._known.move_to_end(digest)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def _verified(resident: Resident, place: _Place, said: list[Said]) -> Commit | None:
    """The commit at a place, if it says that and nothing else."""
    commit = resident.session.at(place.version)
    return None if commit.conversation.raw or _said_by(commit) != said else commit


def _said_by(commit: Commit) -> list[Said]:
    """All that was said by a commit, the system message first."""
    conversation = commit.conversation
    system = conversation.head.system
    first = [] if system is None else [Message("system", system)]
    return canonical([*first, *conversation.messages, *commit.pending])
