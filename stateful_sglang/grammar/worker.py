"""A process for work that may take long or end in a crash: it holds nobody's event loop or GIL.

The process starts with the first call, or with `Worker.warm`, and ends with its parent, whose pipe
it reads. It does one call at a time; a call that passes its deadline ends it, in whatever library
it is.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stateful_sglang.grammar.errors import ConstraintError

DEADLINE_S = 10.0
"""Processor time of one call: a busy machine does not shorten it."""
MAX_WAITING = 32
"""Calls that wait for their turn."""
_MAX_DATA_BYTES = 4 << 30
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
"""Ends that come of the work itself; any other signal comes from outside."""


class WorkerUnavailableError(Exception):
    """As many calls wait as may, or the process ended for no fault of what it was given."""


class Worker:
    """Runs ``module:function``, which takes and returns strings, in another process."""

    def __init__(self, function: str, deadline_s: float = DEADLINE_S) -> None:
        self._function = function
        self._deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraint")
        self._waiting = 0

    async def run(self, *arguments: str) -> str:
        """The function's answer.

        Raises:
            ConstraintError: The function's own; or it took too long or crashed, which for what it
                does is the fault of what it was given.
            WorkerUnavailableError: Too many calls wait, or something else ended the process.
        """
        if self._waiting >= MAX_WAITING:
            raise WorkerUnavailableError(f"{MAX_WAITING} constraints wait to be checked; try again")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._call, arguments)
        finally:
            self._waiting -= 1

    def warm(self, *arguments: str) -> None:
        """Start the process now, with a call whose answer nobody awaits: imports take seconds."""
        self._thread.submit(self._call, arguments)

    def close(self) -> None:
        """End the process, once the call it is at is done."""
        self._thread.shutdown()
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _call(self, arguments: tuple[str, ...]) -> str:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._function, str(self._deadline_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(arguments).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = process.wait()
            self._process = None
            if code == -signal.SIGPROF:
                raise ConstraintError(
                    f"compiling it takes more than {self._deadline_s:g} s of a processor"
                )
            if -code in _CRASHES:
                name = signal.Signals(-code).name
                raise ConstraintError(f"compiling it ends the compiler with {name}")
            raise WorkerUnavailableError(
                f"the process that checks constraints ended with status {code}; try again"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ConstraintError(answer["error"], tool=answer["tool"])
        return str(answer["value"])


def serve(function: str, deadline_s: float) -> None:
    """The process's side: a line in, a line out, until the parent is gone."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(5)  # Who decodes on the same processors goes first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA_BYTES, _MAX_DATA_BYTES))
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, deadline_s)
        try:
            answer = {"value": call(*json.loads(line))}
        except ConstraintError as error:
            answer = {"error": str(error), "tool": error.tool}
        except MemoryError:
            answer = {"error": "compiling it takes too much memory", "tool": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
