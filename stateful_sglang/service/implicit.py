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

import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from stateful_sglang.service.appends import Appends
from stateful_sglang.service.changes import Changes
from stateful_sglang.service.commands import Append, Caller, NewMessages
from stateful_sglang.service.commits import AcceptedAppend
from stateful_sglang.service.core import Core
from stateful_sglang.service.directory import Resident
from stateful_sglang.service.engine import TurnProgress
from stateful_sglang.service.idempotency import Keeping, Scope
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.service.turns import RunningTurn, TurnReader
from stateful_sglang.session.conversation import absorb_system
from stateful_sglang.session.errors import SessionError
from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.ids import new_session_id
from stateful_sglang.session.journal.base import MAX_ASKED, JournalError
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions
from stateful_sglang.session.said import (
    Difference,
    Said,
    canonical,
    digests,
    first_difference,
    one_more,
)
from stateful_sglang.session.session import Session
from stateful_sglang.session.turn import PlannedTurn

logger = logging.getLogger(__name__)

MAX_KNOWN = 200_000
"""Versions that can be found, those that were used last; some 300 bytes each."""

Match = Literal["append", "branch", "new"]


@dataclass(frozen=True)
class Conversation:
    """A request of a stateless API, as far as sessions are concerned."""

    head: Head
    """Tools and what the template is told; the system message is one of the messages."""
    messages: Sequence[Message]
    """All that was said; the last one is what the answer is to."""
    scope: str
    """What else two requests must have in common to share anything."""
    wire: Any
    """The request as the model server's own route made it; its prompt is not looked at."""
    first: Callable[[], Awaitable[array[int]]]
    """Renders the whole conversation as the model server's own route does."""
    read: Callable[[TurnProgress], Message]
    """What the answer says, as the route will send it."""
    stream: bool
    exact: bool = False
    """Its tokens are those of `first`, whatever the session holds; else what is known is neither
    rendered nor tokenised."""
    options: SessionOptions = field(default_factory=SessionOptions)
    repeats: Hashable | None = None
    """Of a request that may repeat one which runs: what the two have in common."""


class Reuse(NamedTuple):
    """What of a request was there already."""

    match: Match
    session_id: str
    version: int
    """That it continues."""
    history_tokens: int
    """Tokens of that version."""
    delta_tokens: int
    messages: int
    """Of the request, those that were known."""
    divergence: Difference | None
    """Where the request left what its session went on with; None where it did not."""


class ImplicitTurn(NamedTuple):
    """A turn of a conversation, for one of those who asked for it."""

    reader: TurnReader
    reuse: Reuse


class _Place(NamedTuple):
    session_id: str
    version: int


class _Asked(NamedTuple):
    """A request on its way to a turn."""

    caller: Caller
    request: Conversation
    said: list[Said]
    chain: list[bytes]
    """Digests of the prefixes of `said`."""
    arrived: float
    """By `time.perf_counter`."""


class Implicit:
    """Finds the sessions of conversations, and runs their turns. For one event loop."""

    def __init__(self, core: Core, changes: Changes, appends: Appends) -> None:
        self._core = core
        self._changes = changes
        self._appends = appends
        self._known: OrderedDict[bytes, _Place] = OrderedDict()
        self._running: dict[tuple[str, Hashable], tuple[RunningTurn, Reuse]] = {}

    def __len__(self) -> int:
        """Versions that can be found."""
        return len(self._known)

    def knows(self, caller: Caller, scope: str, head: Head, messages: Sequence[Message]) -> bool:
        """Whether a conversation seems to go on from one that is known; from any thread."""
        said = canonical(messages)
        chain = digests(_scope(caller, scope, head), said)
        return any(chain[count] in self._known for count in _ends(said))

    async def turn(self, caller: Caller, asked: Conversation) -> ImplicitTurn:
        """Start the turn of a conversation, or join the one that a request like it started.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        self._core.check_accepting()
        arrived = time.perf_counter()
        if asked.repeats is not None:
            running = self._running.get((caller.tenant, asked.repeats))
            if running is not None and not running[0].ended and not running[0].aborting:
                return ImplicitTurn(running[0].reader(), running[1])
        said = canonical(asked.messages)
        chain = digests(_scope(caller, asked.scope, asked.head), said)
        turn, reuse = await self._start(_Asked(caller, asked, said, chain, arrived))
        if asked.repeats is not None:
            self._remember_running((caller.tenant, asked.repeats), turn, reuse)
        return ImplicitTurn(turn.reader(), reuse)

    async def _start(self, asked: _Asked) -> tuple[RunningTurn, Reuse]:
        for count, place in await self._places(asked):
            try:
                async with self._core.directory.use(asked.caller, place.session_id) as resident:
                    commit = _verified(resident, place, asked.said[:count])
                    if commit is not None:
                        self._know(asked.chain[count], place)
                        return await self._continue(asked, resident, commit, count)
            except SessionError as error:
                # Whatever keeps the session from being continued, the request can be served anew.
                logger.info("a known conversation begins anew: %s", error.kind)
                self._known.pop(asked.chain[count], None)
        return await self._anew(asked)

    async def _places(self, asked: _Asked) -> list[tuple[int, _Place]]:
        """Where the request may have come from, the longest beginning first."""
        ends = _ends(asked.said)
        found = [(n, self._known[asked.chain[n]]) for n in ends if asked.chain[n] in self._known]
        if found or not ends:
            return found
        chain = {asked.chain[count]: count for count in ends[:MAX_ASKED]}
        try:
            places = await self._core.journal.said(list(chain))
        except JournalError as error:
            logger.warning("conversations can't be looked up: %s", error)
            return []
        recorded = [(chain[digest], _Place(*place)) for digest, place in places.items()]
        return sorted(recorded, reverse=True)

    async def _continue(
        self, asked: _Asked, resident: Resident, commit: Commit, count: int
    ) -> tuple[RunningTurn, Reuse]:
        session, divergence = resident.session, None
        match: Match = "append"
        if commit is not session.tip or commit.pending or not await resident.writer.take(0.0):
            match = "branch"
            divergence = first_difference(said_by(session.tip), asked.said)
            resident = await self._branch(asked, session, commit.version)
            await resident.writer.take(0.0)
        try:
            plan = await self._plan(asked.request, resident.session, count)
            return self._run(asked, resident, plan, match, count, divergence)
        except BaseException:
            resident.writer.give_back()
            raise

    async def _plan(self, request: Conversation, session: Session, count: int) -> PlannedTurn:
        new = tuple(request.messages[count:])
        if request.exact:
            return self._core.planner.plan_whole(session, new, await request.first())
        return self._core.planner.plan(session, NewMessages(new))

    async def _branch(self, asked: _Asked, source: Session, version: int) -> Resident:
        forked = source.fork(version, asked.request.options)
        keeping = Keeping(Scope(asked.caller.tenant, ""), None)
        await self._changes.add(asked.caller, forked, keeping)
        if forked.held_len:
            await self._core.engine.fork_session(source.id, forked.id, forked.held_len)
        self._core.events.tell(source.id, "forked", version=version)
        resident = self._core.directory.resident(forked.id)
        assert resident is not None
        return resident

    async def _anew(self, asked: _Asked) -> tuple[RunningTurn, Reuse]:
        request = asked.request
        rendered = await request.first()
        if request.exact:
            head, messages = absorb_system(request.head, request.messages)
            plan = PlannedTurn(0, rendered, None, head, messages)
        else:
            plan = self._core.planner.plan_first(request.head, request.messages, rendered)
        await self._changes.make_room(asked.caller)
        session_id = new_session_id()
        history = History.opened(session_id, request.head)
        session = Session(session_id, asked.caller.tenant, history, request.options)
        resident = self._core.directory.add(session)
        await resident.writer.take(0.0)
        return self._run(asked, resident, plan, "new", 0, None)

    def _run(
        self,
        asked: _Asked,
        resident: Resident,
        plan: PlannedTurn,
        match: Match,
        count: int,
        divergence: Difference | None,
    ) -> tuple[RunningTurn, Reuse]:
        session, request = resident.session, asked.request
        tip = session.tip
        sampling = self._core.planner.sampling(Sampling(), plan)

        def all_said(answer: Message) -> bytes:
            return one_more(asked.chain[-1], canonical([answer])[0])

        accepted = AcceptedAppend(
            resident,
            Append(NewMessages(tuple(request.messages[count:])), stream=request.stream),
            plan,
            sampling.max_tokens or 0,
            asked.arrived,
            Keeping(Scope(asked.caller.tenant, session.id), None),
            tip.version,
            len(tip.transcript),
            request.read,
            all_said,
            unrecorded=match == "new",
        )
        turn = self._appends.begin(asked.caller, accepted, sampling, wire=request.wire)

        def ended() -> None:
            tip = session.tip
            if turn.committed and tip.said is not None:
                self._know(tip.said, _Place(session.id, tip.version))
            elif match != "append":
                self._core.spawn(self._forget(session.id, recorded=match == "branch"))

        turn.on_end(ended)
        known, new = len(tip.transcript), len(plan.delta)
        return turn, Reuse(match, session.id, tip.version, known, new, count, divergence)

    async def _forget(self, session_id: str, *, recorded: bool) -> None:
        """Leave nothing of a session whose only turn came to nothing."""
        if recorded:
            await self._core.directory.end(session_id, "closed")
        else:
            self._core.directory.drop(session_id)
            await self._core.engine.close_session(session_id)

    def _know(self, digest: bytes, place: _Place) -> None:
        self._known[digest] = place
        self._known.move_to_end(digest)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _remember_running(self, key: tuple[str, Hashable], turn: RunningTurn, reuse: Reuse) -> None:
        self._running[key] = (turn, reuse)

        def forget() -> None:
            if self._running.get(key, (None,))[0] is turn:
                del self._running[key]

        turn.on_end(forget)


def _scope(caller: Caller, scope: str, head: Head) -> str:
    return f"{caller.tenant} {scope} {head.key}"


def _ends(said: Sequence[Said]) -> list[int]:
    """Lengths of a conversation's beginnings that could be a version, the longest first: those that
    end with an answer."""
    counts = range(len(said) - 1, 0, -1)
    return [count for count in counts if said[count - 1].role == "assistant"]


def _verified(resident: Resident, place: _Place, said: list[Said]) -> Commit | None:
    """The commit at a place, if it says that and nothing else."""
    commit = resident.session.at(place.version)
    return None if commit.conversation.raw or said_by(commit) != said else commit


def said_by(commit: Commit) -> list[Said]:
    """All that was said by a commit, the system message first."""
    conversation = commit.conversation
    system = conversation.head.system
    first = [] if system is None else [Message("system", system)]
    return canonical([*first, *conversation.messages, *commit.pending])
