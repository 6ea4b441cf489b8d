"""Constraints are prepared off the loop, remembered, and can't end more than their own process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stateful_sglang.grammar.constraints import Constraints
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.worker import MAX_WAITING, Worker, WorkerUnavailableError

pytestmark = pytest.mark.anyio

LARGE = '{"enum": [' + ", ".join(f'"value {i}"' for i in range(1000)) + "]}"


def misbehave(how: str) -> str:
    """What a compiler may do, run in a worker's process."""
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while how == "hang":
        pass
    print("a library's chatter")
    return f"{how} in {os.getpid()}"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's process finds this module."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


class Compiler:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.refusal: str | None = None

    async def __call__(self, kind: str, text: str) -> None:
        self.asked.append((kind, text))
        if self.refusal is not None:
            raise ConstraintError(self.refusal)


@pytest.mark.parametrize("text", ['{"type": "string"}', LARGE], ids=["small", "large"])
async def test_what_was_asked_before_is_remembered(text: str) -> None:
    compiler = Compiler()
    constraints = Constraints(compiler)
    first = await constraints.prepared("json_schema", text)
    assert await constraints.prepared("json_schema", text) == first
    assert compiler.asked == [("json_schema", first)]


async def test_a_refusal_is_remembered_too() -> None:
    compiler = Compiler()
    compiler.refusal = "no"
    constraints = Constraints(compiler)
    for _ in range(2):
        with pytest.raises(ConstraintError, match="no"):
            await constraints.prepared("ebnf", 'root ::= "a"')
    assert len(compiler.asked) == 1


async def test_the_same_text_is_another_constraint_as_another_kind() -> None:
    compiler = Compiler()
    constraints = Constraints(compiler)
    await constraints.prepared("regex", "{}")
    await constraints.prepared("json_schema", "{}")
    assert [kind for kind, _ in compiler.asked] == ["regex", "json_schema"]


async def test_tools_are_not_compiled_before_a_call_is_required() -> None:
    compiler = Compiler()
    await Constraints(compiler).prepared("tools", "[]")
    assert compiler.asked == []


async def test_a_large_schemas_error_names_its_tool() -> None:
    bad = f'{{"function": {{"name": "a", "parameters": {{"type": "nothing", "x": {LARGE}}}}}}}'
    good = '{"function": {"name": "b"}}'
    with pytest.raises(ConstraintError, match="not a JSON schema") as error:
        await Constraints(Compiler()).prepared("tools", f"[{good}, {bad}]")
    assert error.value.tool == 1


@pytest.mark.usefixtures("importable")
async def test_a_warm_process_is_there_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    popen = subprocess.Popen

    def counted(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", counted)
    worker = Worker("test_grammar_constraints:misbehave")
    worker.warm("crash")  # whatever becomes of it
    worker.warm("answer")
    await worker.run("answer")
    await worker.run("answer")
    assert len(started) == 2
    worker.close()


@pytest.mark.usefixtures("importable")
async def test_a_call_that_crashes_or_hangs_ends_its_process_and_no_other() -> None:
    worker = Worker("test_grammar_constraints:misbehave", deadline_s=1)
    before = await worker.run("answer")
    assert await worker.run("answer") == before
    with pytest.raises(ConstraintError, match="SIGSEGV"):
        await worker.run("crash")
    with pytest.raises(WorkerUnavailableError, match="try again"):
        await worker.run("killed")
    with pytest.raises(ConstraintError, match="more than 1 s"):
        await worker.run("hang")
    after = await worker.run("answer")
    assert after.split()[:2] == before.split()[:2]
    assert after != before
    worker.close()


@pytest.mark.usefixtures("importable")
def test_the_process_ends_with_its_parent_however_that_ends() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from stateful_sglang.grammar.worker import Worker\n"
        "print(asyncio.run(Worker('test_grammar_constraints:misbehave').run('in')), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(ran.stdout.split()[-1])
    for _ in range(200):
        if not running(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_pattern_that_takes_for_ever_to_match_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constraints = Constraints(Compiler())
    monkeypatch.setattr(constraints._worker, "_deadline_s", 1.0)
    endless = (
        '{"type": "object", "patternProperties": {"^(a+)+$": {}}, "properties": {"%s!": {}}}'
        % ("a" * 60)
    )
    with pytest.raises(ConstraintError, match="of a processor"):
        await constraints.prepared("json_schema", endless)


@pytest.mark.usefixtures("importable")
async def test_no_more_calls_wait_than_may() -> None:
    worker = Worker("test_grammar_constraints:misbehave")
    calls = [worker.run("answer") for _ in range(MAX_WAITING + 1)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in answers] == [str] * MAX_WAITING + [WorkerUnavailableError]
    worker.close()
