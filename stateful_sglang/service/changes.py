"""What changes a session without generating: open, fork, ingest, rollback, edit, touch, close."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, cast

from stateful_sglang.service.commands import (
    Caller,
    Edit,
    Fork,
    Ingest,
    OpenSession,
    Rollback,
    Touch,
)
from stateful_sglang.service.core import Core, journal_errors, view_from, view_json
from stateful_sglang.service.directory import Resident
from stateful_sglang.service.engine import EngineError, TurnProgress, TurnRequest
from stateful_sglang.service.idempotency import Keeping
from stateful_sglang.service.results import Closed, Ingested, SessionView
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.session import tool_results
from stateful_sglang.session.errors import (
    InvalidInputError,
    SessionClosedError,
    TooManySessionsError,
)
from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.ids import new_rid, new_session_id
from stateful_sglang.session.messages import Message
from stateful_sglang.session.records import SessionRecord
from stateful_sglang.session.session import Session

logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Sessions unused longest of which one may go for a new one: those that run stay."""


class Changes:
    """The operations on sessions that generate nothing."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def open(self, caller: Caller, command: OpenSession) -> SessionView:
        """Open a session; nothing is computed."""
        self._core.check_accepting()
        await self._core.planner.check_head(command.head)

        async def run(keeping: Keeping) -> SessionView:
            session_id = new_session_id()
            history = History.opened(session_id, command.head, command.messages)
            session = Session(session_id, caller.tenant, history, command.options)
            return await self.add(caller, session, keeping)

        return await self._core.once(caller, "", command.key, run, view_from)

    async def fork(self, caller: Caller, session_id: str, command: Fork) -> SessionView:
        """Open a session that shares another's past; nothing is copied and nothing computed."""
        self._core.check_accepting()

        async def run(keeping: Keeping) -> SessionView:
            async with self._core.directory.use(caller, session_id) as resident:
                source = resident.session
                version = source.version if command.version is None else command.version
                forked = source.fork(version, command.options)
                return await self.add_fork(caller, source, forked, keeping)

        return await self._core.once(caller, session_id, command.key, run, view_from)

    async def add_fork(
        self, caller: Caller, source: Session, forked: Session, keeping: Keeping
    ) -> SessionView:
        """Take in a fork that was just made; nothing may wait between its making and this."""
        engine = self._core.engine
        # The ranks first: a turn of the source may write other tokens while this waits.
        if forked.held_len:
            await engine.fork_session(source.id, forked.id, forked.held_len)
        try:
            view = await self.add(caller, forked, keeping)
        except BaseException:
            if forked.held_len:
                await engine.close_session(forked.id)
            raise
        self._core.events.tell(source.id, "forked", version=forked.version)
        return view

    async def ingest(self, caller: Caller, session_id: str, command: Ingest) -> Ingested:
        """Add messages without generating; their KV is computed before the answer."""
        self._core.check_accepting()

        async def run(keeping: Keeping) -> Ingested:
            async with self._core.writing(caller, session_id, command.writing) as resident:
                session = resident.session
                conversation, pending = session.tip.conversation, session.tip.pending
                tool_results.check_new(conversation, pending, command.messages)
                paired = tool_results.pair(conversation, [*pending, *command.messages])
                ordered = [*paired.ready, *paired.waiting]
                self._core.planner.check_pending(session.tip, ordered)
                ready, computed = await self._prefill(caller, session, paired.ready)
                async with self._core.recording(resident):
                    commit = session.prepare_pending(ordered)
                    result = Ingested(
                        session.id, commit.version, len(ordered), paired.missing, ready, computed
                    )
                    await self._append(session, commit, keeping, asdict(result))
                self._core.events.tell(
                    session.id, "ingested", version=commit.version, pending=len(ordered)
                )
                return result

        return await self._core.once(caller, session_id, command.writing.key, run, _ingested_from)

    async def rollback(self, caller: Caller, session_id: str, command: Rollback) -> SessionView:
        """Take a session back to one of its versions; the KV of what is kept is kept."""
        self._core.check_accepting()

        async def run(keeping: Keeping) -> SessionView:
            async with self._core.writing(caller, session_id, command.writing) as resident:
                session = resident.session
                tip = session.at(command.version)
                async with self._core.recording(resident):
                    record = replace(self._record(session, tip), used_at=time.time())
                    view = self._core.view_of(record)
                    await self._core.journal.update(record, keeping.result(view_json(view)))
                    session.rollback(command.version)
                await self._core.engine.rollback_session(session.id, session.held_len)
                self._core.events.tell(session.id, "rolled_back", version=session.version)
                return view

        return await self._core.once(caller, session_id, command.writing.key, run, view_from)

    async def edit(self, caller: Caller, session_id: str, command: Edit) -> SessionView:
        """Replace or drop what some turns said. The next turn computes what follows them."""
        self._core.check_accepting()

        async def run(keeping: Keeping) -> SessionView:
            async with self._core.writing(caller, session_id, command.writing) as resident:
                session = resident.session
                parent, pending = _edited(session, command)
                self._core.planner.check_pending(parent, pending)
                async with self._core.recording(resident):
                    commit = session.prepare_pending(pending, parent)
                    view = self._core.view_of(self._record(session, commit))
                    await self._append(session, commit, keeping, view_json(view))
                await self._core.engine.rollback_session(session.id, session.held_len)
                self._core.events.tell(session.id, "edited", version=commit.version)
                return view

        return await self._core.once(caller, session_id, command.writing.key, run, view_from)

    async def touch(self, caller: Caller, session_id: str, command: Touch) -> SessionView:
        """Count the session as used now, and change how it is kept."""
        changes = {name: value for name, value in asdict(command).items() if value is not None}
        async with self._core.directory.use(caller, session_id) as resident:
            session = resident.session
            async with self._core.recording(resident):
                options = replace(session.options, **changes)
                now = time.time()
                record = replace(self._record(session), options=options, used_at=now)
                await self._core.journal.update(record)
                session.options, session.used_at = options, now
            self._core.events.tell(session.id, "touched", version=session.version)
            return self._core.view(session)

    async def close(self, caller: Caller, session_id: str, *, erase: bool = False) -> Closed:
        """End a session, aborting what runs of it first."""
        record = await self._core.directory.record(caller, session_id)
        version = record.version

        async def run() -> int:
            resident = self._core.directory.resident(session_id)
            try:
                if resident is not None:
                    await _stop(resident)
                with journal_errors("the session could not be closed"):
                    await self._core.directory.end(session_id, "closed", erase=erase)
            except BaseException:
                # What still exists is read anew: this resident of it takes no turn any more.
                self._core.directory.drop(session_id)
                raise
            return version if resident is None else resident.session.version

        version = await self._core.finish(run())
        self._core.events.tell(session_id, "closed", version=version, erased=erase)
        self._core.observer.session_ended("closed")
        return Closed(session_id, version, erase)

    async def add(self, caller: Caller, session: Session, keeping: Keeping) -> SessionView:
        """Take in a session that was just made, with all of its history."""
        await self.make_room(caller)
        record = self._record(session)
        view = self._core.view_of(record)
        with journal_errors("the session could not be recorded"):
            await self._core.journal.open(record, session.history, keeping.result(view_json(view)))
        self._core.directory.add(session)
        self._core.observer.session_opened()
        return view

    async def make_room(self, caller: Caller) -> None:
        """Let the tenant's session that was unused longest expire where it has as many as it may.

        Raises:
            TooManySessionsError: None of them is idle.
        """
        journal, directory = self._core.journal, self._core.directory
        limit, tokens = self._core.limits.max_sessions, None
        if caller.limits is not None:
            limit, tokens = caller.limits.sessions, caller.limits.tokens
        with journal_errors("sessions can't be counted"):
            totals = await journal.totals(caller.tenant)
            if totals.sessions < limit and (tokens is None or totals.tokens < tokens):
                return
            for session_id in await journal.oldest(caller.tenant, _LOOKED_AT):
                resident = directory.resident(session_id)
                if resident is None or resident.idle:
                    await self._core.expire(session_id)
                    return
        raise TooManySessionsError(limit)

    async def _append(
        self, session: Session, commit: Commit, keeping: Keeping, result: Mapping[str, Any]
    ) -> None:
        record = replace(self._record(session, commit), used_at=time.time())
        await self._core.journal.append(record, commit, keeping.result(result))
        session.publish(commit)

    def _record(self, session: Session, tip: Commit | None = None) -> SessionRecord:
        return session.record(self._core.engine.model_digest, tip)

    async def _prefill(
        self, caller: Caller, session: Session, messages: Sequence[Message]
    ) -> tuple[int, int]:
        """Compute what the next turn begins with: its length in tokens, and those computed now."""
        plan = self._core.planner.plan_prefill(session, messages) if messages else None
        if plan is None:
            return 0, 0
        for _ in range(2):
            base_len, delta = session.begin(plan)
            request = TurnRequest(
                session.id,
                new_rid(),
                base_len,
                delta,
                Sampling(max_tokens=1),
                stream=False,
                kind="prefill",
                salt=caller.salt,
            )
            try:
                last = None
                run = cast(AsyncGenerator[TurnProgress, None], self._core.engine.run(request))
                async with aclosing(run) as progresses:
                    async for progress in progresses:
                        last = progress
            except EngineError as error:
                # The messages are kept all the same, and computed with the next turn.
                logger.info("an ingest was not computed ahead: %s", error.message)
                if error.kind != "stale_base":
                    return 0, 0
                session.held_len = 0
            else:
                computed = 0 if last is None else last.prompt_tokens - last.cached_tokens
                return len(plan.delta), computed
        return 0, 0


async def _stop(resident: Resident) -> None:
    """Let nothing more begin, and abort what runs."""
    resident.writer.close(SessionClosedError())
    turns = [*resident.beside, *([] if resident.turn is None else [resident.turn])]
    for turn in turns:
        turn.cancel(SessionClosedError())
    for turn in turns:
        await turn.wait()


def _edited(session: Session, command: Edit) -> tuple[Commit, list[Message]]:
    """The commit that an edit continues, and the messages behind it.

    Raises:
        UnknownCommitError: There is no such version.
        InvalidInputError: The versions are not in a row, or text stands where messages would.
    """
    tip = session.tip
    after = session.at(command.after, "after")
    through = tip if command.through is None else session.at(command.through, "through")
    way: list[Commit] = [tip]
    while way[-1] is not after and way[-1].parent is not None:
        way.append(way[-1].parent)
    if way[-1] is not after:
        raise InvalidInputError(
            "after", f"version {after.version} is not on the way to version {tip.version}"
        )
    if through not in way:
        raise InvalidInputError(
            "through",
            f"version {through.version} is not on the way from version {after.version} to version "
            f"{tip.version}",
        )
    if any(_is_raw(commit) for commit in way[:-1]):
        raise InvalidInputError(
            "after", "text or input_ids were appended after it, which no messages stand for"
        )
    later = _said(tip)[len(_said(through)) :]
    return after, [*after.pending, *command.messages, *later]


def _is_raw(commit: Commit) -> bool:
    """Whether a commit added tokens that no messages stand for."""
    return len(commit.transcript) > commit.base_len and not commit.messages


def _said(commit: Commit) -> list[Message]:
    return [*commit.conversation.messages, *commit.pending]


def _ingested_from(kept: Mapping[str, Any]) -> Ingested:
    return Ingested(**{**kept, "missing": tuple(kept["missing"])})
