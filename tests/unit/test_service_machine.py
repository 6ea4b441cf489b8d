"""Any order of all operations, failures and restarts agrees with a pure model of sessions."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from engine_double import CHATML, END, FORGETFUL, EngineDouble
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from pydantic import ValidationError
from session_reference import Said
from session_rules import (
    Body,
    RefusedError,
    SessionRules,
    limits,
    one_of,
    picks,
    slots,
    users,
)

from stateful_sglang.api.errors import from_validation
from stateful_sglang.api.native import changes, forms, schemas, sessions
from stateful_sglang.service import turns
from stateful_sglang.service.commands import Caller, ListSessions
from stateful_sglang.service.service import Limits, SessionService
from stateful_sglang.service.turns import TurnReader
from stateful_sglang.session.errors import SessionError
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.rank import RankSessions

ME = Caller()
EXAMPLES = int(os.environ.get("STATEFUL_SGLANG_MACHINE_EXAMPLES", "50"))
STEPS = 50
OUT_OF_MEMORY = {"type": "abort", "message": "Out of memory even after retracting all others"}


class Engine(EngineDouble):
    """A model server whose next turns end as told, the rest well."""

    def __init__(self, context: int, template: str) -> None:
        super().__init__(context, template)
        self.ends: list[Mapping[str, Any] | Exception] = []

    async def run(self, turn: Any) -> Any:
        self.end_with = self.ends.pop(0) if self.ends else None
        async for progress in super().run(turn):
            yield progress


class Disk:
    """A real journal that fails when it is full."""

    def __init__(self, journal: SqliteJournal) -> None:
        self._journal = journal
        self.full = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._journal, name)
        if name not in ("append", "open", "update", "keep"):
            return method

        async def write(*args: Any) -> Any:
            if self.full:
                raise JournalError("the disk is full")
            return await method(*args)

        return write


class ServiceDoor:
    """A service in this process, over a journal in a file."""

    def __init__(self, folder: Path, context: int, template: str) -> None:
        self.context = context
        self._template = template
        self._path = folder / "journal.sqlite3"
        self.connect()

    def connect(self) -> None:
        self.engine = Engine(self.context, self._template)
        self.disk = Disk(SqliteJournal.connect(self._path, sync="normal"))
        self.service = SessionService(self.engine, self.disk, Limits(resident_tokens=3000))

    async def restart(self, *, drained: bool) -> None:
        """The process ends, in order or not, and there is another one."""
        if drained:
            await self.service.shutdown()
        else:
            maintenance = self.service._maintenance
            if maintenance is not None:
                maintenance.cancel()
            await self.disk.close()
        self.connect()

    async def arrived(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    def encode(self, text: str) -> list[int]:
        return self.engine.tokenizer.encode(text)

    def text_of(self, output: Sequence[int]) -> str:
        output = output[:-1] if output and output[-1] == END else output
        return self.engine.tokenizer.decode(output)

    def check_answer(
        self, prompt: Sequence[int], output: Sequence[int], limit: int, finish: str | None
    ) -> None:
        if self.engine.script is None:
            assert list(output) == self.engine.answer_to(list(prompt), limit)
        if finish is not None:
            assert finish == ("stop" if output[-1] == END else "length")

    async def call(self, operation: str, session: str | None, body: Body) -> Body:
        try:
            return await self._call(operation, session, body)
        except ValidationError as error:
            refused = from_validation(error.errors())
            raise RefusedError(refused.kind, {"message": refused.message}) from error
        except SessionError as error:
            details = {"message": error.message, **error.details}
            raise RefusedError(error.kind, details) from error

    async def _call(self, operation: str, session: str | None, body: Body) -> Body:
        service, sent = self.service, json.dumps(body)
        match operation:
            case "open":
                command = schemas.OpenBody.model_validate_json(sent).to_command()
                return forms.session_form(await service.open(ME, command))
            case "list":
                return forms.list_form(await service.list(ME, ListSessions(**body)))
            case "import":
                asked = changes.ImportBody.model_validate_json(sent)
                view = await service.import_(ME, asked.session.to_export(), key=asked.to_key())
                return forms.session_form(view)
        assert session is not None
        match operation:
            case "append" | "generate":
                asked, reader = await self._begun(operation, session, body)
                if asked.stream:
                    text = "".join([each async for each in reader.texts()])
                    assert text == (await reader.result()).text
                return forms.turn_form(await reader.result(), output_ids=asked.return_output_ids)
            case "ingest":
                command = changes.IngestBody.model_validate_json(sent).to_command()
                return forms.ingested_form(await service.ingest(ME, session, command))
            case "fork":
                asked = changes.ForkBody.model_validate_json(sent)
                command = asked.to_command(await sessions._options(service, ME, session))
                return forms.session_form(await service.fork(ME, session, command))
            case "rollback":
                command = changes.RollbackBody.model_validate_json(sent).to_command()
                return forms.session_form(await service.rollback(ME, session, command))
            case "edit":
                command = changes.EditBody.model_validate_json(sent).to_command()
                return forms.session_form(await service.edit(ME, session, command))
            case "touch":
                command = changes.TouchBody.model_validate_json(sent).to_command()
                return forms.session_form(await service.touch(ME, session, command))
            case "get":
                return forms.session_form(await service.get(ME, session))
            case "messages":
                found = await service.messages(ME, session, body.get("version"))
                return forms.messages_form(found)
            case "export":
                return json.loads(json.dumps(await service.export(ME, session)))
            case "close":
                return forms.closed_form(await service.close(ME, session, **body))
        raise AssertionError(operation)

    async def told(
        self, session: str, work: Callable[[], Awaitable[None]]
    ) -> list[tuple[str, int | None]]:
        heard = []
        events = self.service.events(ME, session)
        heard.append(await anext(events))
        await work()
        heard += [event async for event in events]
        return [(event.name, event.data.get("version")) for event in heard]

    async def _begun(self, operation: str, session: str, body: Body) -> tuple[Any, TurnReader]:
        model = schemas.GenerateBody if operation == "generate" else schemas.AppendBody
        asked = model.model_validate_json(json.dumps(body))
        return asked, await self.service.append(ME, session, asked.to_command())

    async def abandon(
        self, operation: str, session: str, body: Body, moments: int, *, streamed: bool
    ) -> None:
        task = asyncio.create_task(self._begun(operation, session, body))
        for _ in range(2 * moments):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            _, reader = await task
            for _ in range(moments):
                await asyncio.sleep(0)
            reader.leave()


class ServiceSessions(SessionRules):
    """The rules over a service, with what only a double lets happen."""

    door: ServiceDoor

    def make_door(self) -> ServiceDoor:
        self.folder = tempfile.TemporaryDirectory()
        return self.do(self._door())

    async def _door(self) -> ServiceDoor:
        return ServiceDoor(Path(self.folder.name), 1200, FORGETFUL if self.rewrites else CHATML)

    def teardown(self) -> None:
        self.do(self.door.service.shutdown())
        self.runner.close()
        self.folder.cleanup()

    @rule(drained=st.booleans())
    def restart(self, drained: bool) -> None:
        self.do(self.door.restart(drained=drained))
        self.all_are_the_same()

    @rule()
    def lose_a_ranks_sessions(self) -> None:
        """A scheduler that knows no session any more is told everything again."""
        self.door.engine.rank = RankSessions()

    @rule()
    def leave_memory(self) -> None:
        self.do(self.door.service._core.directory.trim())

    @rule(slot=slots, calls=st.integers(1, 3), limit=st.just(200))
    def answer_with_calls(self, slot: int, calls: int, limit: int) -> None:
        """Opened with a tool, a session's answers may call it: here in a session of its own."""
        self.make_room()
        tool = {"type": "function", "function": {"name": "look"}}
        opened = self.call("open", tools=[tool])["id"]
        block = '<tool_call>\n{"name": "look", "arguments": {"n": 1}}\n</tool_call>'
        self.door.engine.script = "so" + block * calls
        try:
            got = self.call(
                "append",
                opened,
                messages=[{"role": "user", "content": "look"}],
                sampling={"max_tokens": 400},
            )
        finally:
            self.door.engine.script = None
        named = [call["id"] for call in got["message"].get("tool_calls", ())]
        if got["finish_reason"] == "tool_calls":
            assert len(named) == calls
            for at in reversed(range(calls)):
                result = {"role": "tool", "content": f"{at}", "tool_call_id": named[at]}
                reply = self.call("ingest", opened, messages=[result])
                assert reply["missing"] == named[:at]
            found = self.call("messages", opened)["pending"]
            assert [each["tool_call_id"] for each in found] == named
        self.call("close", opened)

    @rule(slot=slots, new=users, raised=st.booleans(), prefill=st.booleans())
    def fail(self, slot: int, new: list[Said], raised: bool, prefill: bool) -> None:
        """What the engine breaks is not committed; an ingest is kept, and computed later."""
        session = self.pick(slot)
        if self.refuses(session, new):
            return
        aborted = {"type": "abort", "message": "no", "status_code": 503}
        # Twice: a rank that has lost its sessions refuses the first.
        self.door.engine.ends = [RuntimeError("no") if raised else aborted] * 2
        try:
            if prefill and not raised:
                self.ingest(session, new, False)
                return
            got = self.tried(*self.addressed(session, new))
            kinds = ("engine_error", "engine_unavailable")
            assert got in kinds, got
        finally:
            self.door.engine.ends = []

    @rule(slot=slots, new=users, times=st.integers(1, 4), limit=limits)
    def run_out_of_memory(self, slot: int, new: list[Said], times: int, limit: int) -> None:
        """A turn that the scheduler gave up is run again, and nobody is told."""
        session = self.pick(slot)
        self.door.engine.ends = [OUT_OF_MEMORY for _ in range(times)]
        try:
            self.play_turn(session, new, limit)
        finally:
            self.door.engine.ends = []

    @rule(slot=slots, new=users, what=st.sampled_from(["append", "ingest"]))
    def fail_to_record(self, slot: int, new: list[Said], what: str) -> None:
        session = self.pick(slot)
        if self.refuses(session, new):
            return
        self.door.disk.full = True
        try:
            operation, at, body = self.addressed(session, new)
            if what == "ingest":
                operation, body = "ingest", {"messages": body["messages"]}
            got = self.tried(operation, at, body)
            kinds = ("commit_failed", "journal_failed")
            assert got in kinds, got
        finally:
            self.door.disk.full = False

    @rule(slot=slots, pick=picks)
    def fail_to_record_a_change(self, slot: int, pick: int) -> None:
        session = self.pick(slot)
        version = one_of([*self.reference[session].own], pick)
        self.door.disk.full = True
        try:
            for operation in ("rollback", "fork"):
                got = self.tried(operation, session, {"version": version})
                assert got == "journal_failed", got
        finally:
            self.door.disk.full = False

    @rule(slot=slots, new=users, moments=st.integers(0, 6))
    def close_beside_a_turn(self, slot: int, new: list[Said], moments: int) -> None:
        """The turn ends with its session; here on a fork, which lives for this alone."""
        session = self.pick(slot)
        if self.refuses(session, new):
            return
        fork = self.call("fork", session)["id"]
        operation, body = self.turn_body(new, 8)

        async def both() -> Body | str:
            async def one() -> Body | str:
                try:
                    return await self.door.call(operation, fork, body)
                except RefusedError as refused:
                    return refused.kind

            task = asyncio.create_task(one())
            for _ in range(moments):
                await asyncio.sleep(0)
            await self.door.call("close", fork, {})
            return await task

        got = self.do(both())
        ends = ("session_closed", "session_not_found")
        assert not isinstance(got, str) or got in ends, got

    def leave_detached(self, session: str, said: list[Said]) -> None:
        operation, body = self.turn_body(said, 9, detach=True)

        async def run() -> None:
            _, reader = await self.door._begun(operation, session, body)
            reader.leave()
            await reader.wait()

        self.do(run())

    def addressed(self, session: str, new: list[Said]) -> tuple[str, str, Body]:
        operation, body = self.turn_body(new, 6)
        return operation, session, body


class ForgetfulSessions(ServiceSessions):
    """With a template that rewrites everything at every turn."""

    rewrites = True


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is sent again at once."""
    monkeypatch.setattr(turns, "_FIRST_PAUSE_S", 0.0)


_SETTINGS = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)
TestServiceSessions = ServiceSessions.TestCase
TestServiceSessions.settings = _SETTINGS
TestForgetfulSessions = ForgetfulSessions.TestCase
TestForgetfulSessions.settings = _SETTINGS
