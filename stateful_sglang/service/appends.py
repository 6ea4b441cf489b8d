"""Turns from their request to their end: joined by key, in line for the session, planned, run."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from stateful_sglang.service.commands import Append, Caller
from stateful_sglang.service.commits import AcceptedAppend, Committer
from stateful_sglang.service.core import Core, journal_errors
from stateful_sglang.service.directory import Resident
from stateful_sglang.service.engine import TurnProgress, TurnRequest
from stateful_sglang.service.idempotency import Keeping, KeyedWork, Scope
from stateful_sglang.service.observe import Outcome
from stateful_sglang.service.plan import constrained_by
from stateful_sglang.service.results import TurnResult, from_json
from stateful_sglang.service.sampling import Constraint, Sampling
from stateful_sglang.service.turns import KeptTurn, RunningTurn, TurnReader
from stateful_sglang.session.errors import (
    CommitFailedError,
    SessionClosedError,
    SessionError,
    TurnAbortedError,
)
from stateful_sglang.session.ids import new_rid
from stateful_sglang.session.records import KeyedResult


class Appends:
    """The operations on sessions that generate."""

    def __init__(self, core: Core, committer: Committer) -> None:
        self._core = core
        self._committer = committer
        self._turns: KeyedWork[RunningTurn] = KeyedWork(core.journal)
        self._running: set[RunningTurn] = set()

    async def ended(self) -> None:
        """Until no turn runs."""
        while self._running:
            await asyncio.gather(*(turn.wait() for turn in self._running))

    def cancel(self) -> None:
        """Begin to abort every turn that runs."""
        for turn in list(self._running):
            turn.cancel()

    async def append(self, caller: Caller, session_id: str, command: Append) -> TurnReader:
        """Start a turn, or join the one that was started under the same key.

        It may wait for the session's other turns; a caller that is cancelled meanwhile leaves.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        self._core.check_accepting()
        arrived = time.perf_counter()
        keeping = Keeping(Scope(caller.tenant, session_id), command.writing.key)
        start = partial(self._start, caller, session_id, command, keeping, arrived)
        if keeping.key is None:
            return (await start()).reader()
        while True:
            with journal_errors("the results under idempotency keys can't be read"):
                known = await self._turns.join(keeping)
            if known is None:
                return (await self._turns.start(keeping, start)).reader()
            if isinstance(known, KeyedResult):
                return KeptTurn(from_json(known.result))
            if not known.aborting and not known.ended:
                return known.reader()
            await known.wait()
            if known.committed:
                return KeptTurn(await known.result())

    async def _start(
        self, caller: Caller, session_id: str, command: Append, keeping: Keeping, arrived: float
    ) -> RunningTurn:
        async with self._core.directory.use(caller, session_id) as resident:
            if command.ephemeral:
                self._core.check_version(resident.session, command.writing.expected_version)
                return await self._run(caller, resident, command, keeping, arrived)
            await self._core.take(resident, command.writing)
            try:
                return await self._run(caller, resident, command, keeping, arrived)
            except BaseException:
                resident.writer.give_back()
                raise

    async def _run(
        self,
        caller: Caller,
        resident: Resident,
        command: Append,
        keeping: Keeping,
        arrived: float,
    ) -> RunningTurn:
        session = resident.session
        constraint = await self._core.planner.constraint(command, session.tip.conversation.head)
        # From here to the turn's task nothing waits, so that the tip stays what it is.
        tip = session.tip
        plan = self._core.planner.plan(session, command.content)
        sampling = self._core.planner.sampling(command.sampling, plan)
        accepted = AcceptedAppend(
            resident,
            command,
            plan,
            sampling.max_tokens or 0,
            arrived,
            keeping,
            tip.version,
            len(tip.transcript),
        )
        return self.begin(caller, accepted, sampling, constraint)

    def begin(
        self,
        caller: Caller,
        accepted: AcceptedAppend,
        sampling: Sampling,
        constraint: Constraint | None = None,
        wire: Any = None,
    ) -> RunningTurn:
        """Run what was accepted, as the session's writer or beside it; gives the place back.

        Args:
            caller: Whose turn it is.
            accepted: Planned at the session's tip, which has not moved since.
            sampling: How to generate.
            constraint: What the answer is bound to.
            wire: The request in the model server's own form, which then says both of these.
        """
        resident, command, plan = accepted.resident, accepted.command, accepted.plan
        keeping, arrived = accepted.keeping, accepted.arrived
        session = resident.session
        tip = session.tip

        def request() -> TurnRequest:
            ephemeral = command.ephemeral
            base_len, delta = session.offer(plan, tip) if ephemeral else session.begin(plan)
            return TurnRequest(
                session.id,
                new_rid(),
                base_len,
                delta,
                sampling,
                constraint,
                command.stream,
                "ephemeral" if ephemeral else "turn",
                wire,
                caller.salt,
            )

        async def commit(last: TurnProgress, first_token_at: float) -> TurnResult:
            return await self._committer.commit(accepted, last, first_token_at)

        def release(error: SessionError | None) -> None:
            self._running.discard(turn)
            if command.ephemeral:
                resident.beside.discard(turn)
            else:
                resident.turn = None
                resident.writer.give_back()
                self._tell_end(resident, error)
            self._turns.over(keeping)
            self._core.observer.turn_ended(
                _outcome(error, ephemeral=command.ephemeral),
                time.perf_counter() - arrived,
                turn.ttft_s(arrived),
                turn.generated_tokens,
            )
            if resident.recovering and error is None:
                resident.recovering = False
                self._core.observer.recovered(turn.ttft_s(arrived) or 0.0)

        def on_stale() -> None:
            session.held_len = 0

        turn = RunningTurn(
            self._core.engine,
            request,
            commit=commit,
            release=release,
            constraint=constrained_by(command),
            detached=command.detach,
            on_stale=on_stale,
        )
        self._running.add(turn)
        if command.ephemeral:
            resident.beside.add(turn)
        else:
            resident.turn = turn
            self._core.events.tell(session.id, "turn.started", version=session.version)
        return turn

    def _tell_end(self, resident: Resident, error: SessionError | None) -> None:
        session = resident.session
        if error is None:
            tip = session.tip
            self._core.events.tell(
                session.id,
                "turn.committed",
                version=tip.version,
                finish_reason=tip.finish_reason,
                tokens=len(tip.transcript),
            )
        else:
            self._core.events.tell(
                session.id, "turn.failed", version=session.version, error=error.kind
            )


def _outcome(error: SessionError | None, *, ephemeral: bool) -> Outcome:
    if error is None:
        return "ephemeral" if ephemeral else "committed"
    if isinstance(error, CommitFailedError):
        return "unrecorded"
    return "aborted" if isinstance(error, TurnAbortedError | SessionClosedError) else "failed"
