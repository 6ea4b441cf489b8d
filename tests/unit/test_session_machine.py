"""Any order of opens, appends, aborts, failures and closes agrees with a few lines of string."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from engine_double import FORGETFUL, EngineDouble
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)
from one_tenant import OneTenant

from stateful_sglang.api.native.forms import turn_form
from stateful_sglang.api.native.schemas import AppendBody, OpenBody
from stateful_sglang.service.commands import ListSessions
from stateful_sglang.session import errors
from stateful_sglang.session.history import Commit
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.records import SessionRecord

words = st.text("abc xyz", min_size=1, max_size=12)
limits = st.integers(1, 20)


def turn_text(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


@dataclass
class Reference:
    """A session as its text."""

    system: str | None
    text: str = ""
    version: int = 0

    def with_messages(self, contents: list[str]) -> str:
        before = self.text
        if not before and self.system is not None:
            before = turn_text("system", self.system)
        elif before:
            before = before.removesuffix("<|im_end|>") + "<|im_end|>\n"
        new = "".join(turn_text("user", content) for content in contents)
        return f"{before}{new}<|im_start|>assistant\n"


class Disk:
    """A journal that takes its time, and is full when told so."""

    def __init__(self) -> None:
        self.inner = SqliteJournal.connect(None)
        self.full = False
        self.recorded: dict[str, list[Commit]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def append(self, record: SessionRecord, commit: Commit, keyed: Any = None) -> None:
        await asyncio.sleep(0)
        if self.full:
            raise JournalError("No space left on device", full=True)
        await self.inner.append(record, commit, keyed)
        self.recorded.setdefault(record.id, []).append(commit)


class Sessions(RuleBasedStateMachine):
    template: str | None = None
    open_sessions = Bundle("open_sessions")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        extra = {} if self.template is None else {"template": self.template}
        self.engine = EngineDouble(context_length=2000, **extra)
        self.disk = Disk()
        self.service = self.runner.run(self._service())
        self.reference: dict[str, Reference] = {}

    async def _service(self) -> OneTenant:
        return OneTenant(self.engine, journal=self.disk)

    def teardown(self) -> None:
        self.runner.run(self.service.shutdown())
        self.runner.close()

    @rule(target=open_sessions, system=st.none() | words)
    def open(self, system: str | None) -> str:
        session = self.runner.run(self.service.open(OpenBody(system=system).to_command())).id
        self.reference[session] = Reference(system)
        return session

    def expected_prompt(self, session: str, contents: list[str]) -> str:
        return self.reference[session].with_messages(contents)

    async def _append(self, session: str, body: AppendBody) -> dict[str, Any]:
        return turn_form(await (await self.service.append(session, body.to_command())).result())

    def _check(self, session: str, body: AppendBody, prompt_text: str) -> None:
        """Run a turn that must commit, and apply it to the reference."""
        reference = self.reference[session]
        prompt = self.engine.tokenizer.encode(prompt_text)
        limit = body.sampling.max_tokens or 0
        if len(prompt) >= self.engine.context_length:
            with pytest.raises(errors.ContextOverflowError):
                self.runner.run(self._append(session, body))
            return
        reply = self.runner.run(self._append(session, body))
        room = self.engine.context_length - len(prompt)
        output = self.engine.answer_to(prompt, min(limit, room))
        assert self.engine.prompts[-1] == prompt
        assert reply["text"] == self.engine.tokenizer.decode(output, skip_special_tokens=True)
        usage = reply["usage"]
        held = len(self.engine.tokenizer.encode(reference.text))
        assert usage["history_tokens"] == held
        assert held - usage["rewound_tokens"] + usage["delta_tokens"] == len(prompt)
        reference.text = prompt_text + self.engine.tokenizer.decode(output)
        reference.version += 1

    @rule(session=open_sessions, contents=st.lists(words, min_size=1, max_size=3), limit=limits)
    def append(self, session: str, contents: list[str], limit: int) -> None:
        self._check(session, body_of(contents, limit), self.expected_prompt(session, contents))

    @rule(session=open_sessions, content=words, tokens=st.integers(0, 3))
    def abort(self, session: str, content: str, tokens: int) -> None:
        async def run() -> None:
            self.engine.script, self.engine.pause_after = "never to be seen", tokens
            self.engine.paused.clear()
            turn = await self.service.append(session, body_of([content], 20).to_command())
            await self.engine.paused.wait()
            refused = body_of([content], 20).model_copy(update={"on_busy": "fail"})
            with pytest.raises(errors.SessionBusyError):
                await self.service.append(session, refused.to_command())
            turn.leave()
            await turn.wait()
            with pytest.raises(errors.TurnAbortedError):
                await turn.result()

        try:
            self.runner.run(run())
        except errors.ContextOverflowError:
            pass
        finally:
            self.engine.script = self.engine.pause_after = None

    @rule(session=open_sessions, content=words, raised=st.booleans())
    def fail(self, session: str, content: str, raised: bool) -> None:
        aborted = {"type": "abort", "message": "no", "status_code": 503}
        self.engine.end_with = RuntimeError("no") if raised else aborted
        try:
            with pytest.raises((errors.EngineFailedError, errors.ContextOverflowError)):
                self.runner.run(self._append(session, body_of([content], 20)))
        finally:
            self.engine.end_with = None

    @rule(session=open_sessions, content=words)
    def fail_to_record(self, session: str, content: str) -> None:
        self.disk.full = True
        try:
            with pytest.raises((errors.CommitFailedError, errors.ContextOverflowError)):
                self.runner.run(self._append(session, body_of([content], 20)))
        finally:
            self.disk.full = False

    @rule(session=open_sessions, content=words, off=st.sampled_from([-1, 1]))
    def append_at_another_version(self, session: str, content: str, off: int) -> None:
        version = max(0, self.reference[session].version + off)
        if version == self.reference[session].version:
            return
        body = body_of([content], 5).model_copy(update={"expected_version": version})
        with pytest.raises(errors.VersionMismatchError):
            self.runner.run(self._append(session, body))

    @rule(session=consumes(open_sessions), content=words, running=st.booleans())
    def close(self, session: str, content: str, running: bool) -> None:
        async def run() -> None:
            turn = None
            if running:
                try:
                    turn = await self.service.append(session, body_of([content], 5).to_command())
                except errors.ContextOverflowError:
                    turn = None
            await self.service.close(session)
            if turn is not None:
                with contextlib.suppress(errors.SessionClosedError):
                    await turn.result()  # its end may beat the abort
            with pytest.raises(errors.SessionNotFoundError):
                await self.service.append(session, body_of([content], 5).to_command())

        self.runner.run(run())
        assert self.engine.closed[-1] == session
        del self.reference[session]

    @invariant()
    def versions_and_sizes_agree(self) -> None:
        listed = self.runner.run(self.service.list(ListSessions(1000)))
        assert listed.total == len(self.reference)
        for session, reference in self.reference.items():
            view = self.runner.run(self.service.get(session))
            tokens = len(self.engine.tokenizer.encode(reference.text))
            assert (view.version, view.tokens) == (reference.version, tokens)
            assert not view.busy

    @invariant()
    def what_was_recorded_is_what_was_published(self) -> None:
        for session, reference in self.reference.items():
            recorded = self.disk.recorded.get(session, [])
            assert [each.version for each in recorded] == list(range(1, reference.version + 1))
            tokens: list[int] = []
            for commit in recorded:
                tokens = tokens[: commit.base_len] + commit.tokens.tolist()
            assert tokens == self.engine.tokenizer.encode(reference.text)


class RawSessions(Sessions):
    """With text among the messages."""

    @rule(session=Sessions.open_sessions, text=words, limit=limits)
    def append_text(self, session: str, text: str, limit: int) -> None:
        reference = self.reference[session]
        body = AppendBody.model_validate({"text": text, "sampling": {"max_tokens": limit}})
        if not reference.version and reference.system is not None:
            with pytest.raises(errors.InvalidInputError):
                self.runner.run(self._append(session, body))
            return
        self._check(session, body, reference.text + text)


class ForgetfulSessions(Sessions):
    """With a template that rewrites everything at every turn."""

    template = FORGETFUL

    def expected_prompt(self, session: str, contents: list[str]) -> str:
        return turn_text("user", contents[-1]) + "<|im_start|>assistant\n"


def body_of(contents: list[str], limit: int) -> AppendBody:
    messages = [{"role": "user", "content": content} for content in contents]
    return AppendBody.model_validate({"messages": messages, "sampling": {"max_tokens": limit}})


_SETTINGS = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestRawSessions = RawSessions.TestCase
TestRawSessions.settings = _SETTINGS
TestForgetfulSessions = ForgetfulSessions.TestCase
TestForgetfulSessions.settings = _SETTINGS
