"""A server that is killed and comes back at the same address, with the same journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import httpx
import psutil  # type: ignore[import-untyped]

from bench.harness import http
from bench.harness.server import Server, ServerDiedError, free_port, serve

Process = Literal["api", "scheduler", "detokenizer", "supervisor"]
_TIMEOUT_S = 300.0
_POLL_S = 0.1
_MOST_FAILED = 5


class Lives:
    """One server after another; as a context manager it ends the last one."""

    def __init__(
        self, journal: Path, arguments: Sequence[str] = (), *, pause_s: float = 20.0, **env: str
    ) -> None:
        """
        Args:
            journal: The file that all of them record in.
            arguments: More of the launcher's.
            pause_s: Before another try, where it ended before it was healthy.
            env: Added to their environment.
        """
        self._arguments = (*arguments, "--journal", str(journal))
        self._env = env
        self._port = free_port()
        self._life = contextlib.ExitStack()
        self._server: Server | None = None
        self._supervised = self._comes_back = False
        self._pause_s = pause_s
        self.url = f"http://127.0.0.1:{self._port}"
        self.failed_starts: list[str] = []
        """Why those ended that were never healthy."""

    @property
    def processes(self) -> tuple[Process, ...]:
        """Those that `kill` can find."""
        supervisor: tuple[Process, ...] = ("supervisor",) if self._supervised else ()
        return ("api", "scheduler", "detokenizer", *supervisor)

    def start(self, *, supervised: bool = False) -> float:
        """Start it; seconds until it was healthy. One that ends at once is started again: others on
        the machine may have taken the memory for a while.

        Args:
            supervised: It starts itself again after a kill.

        Raises:
            ServerDiedError: That happened too often.
        """
        more = ("--restart", "on-crash") if supervised else ()
        self._supervised = supervised
        while True:
            try:
                life = serve(*self._arguments, *more, port=self._port, env=self._env)
                self._server = self._life.enter_context(life)
            except ServerDiedError as error:
                self.failed_starts.append(str(error))
                if len(self.failed_starts) > _MOST_FAILED:
                    raise
                time.sleep(self._pause_s)
            else:
                return self._server.start_s

    def kill(self, which: Process) -> None:
        """Kill one of its processes with SIGKILL, and wait until the server is gone."""
        api = self._api()
        self._find(which).kill()
        self._comes_back = self._supervised and which != "supervisor"
        try:
            api.wait(_TIMEOUT_S)
        except psutil.TimeoutExpired:
            raise RuntimeError(f"the server lives on without its {which}") from None

    def revive(self, *, supervised: bool = False) -> float:
        """After a kill: seconds until it is healthy again.

        Args:
            supervised: Where it does not come back by itself, from now on it does.
        """
        began = time.monotonic()
        if self._comes_back:
            self.wait_healthy()
        else:
            self.stop()
            self.start(supervised=supervised)
        return time.monotonic() - began

    def wait_healthy(self) -> None:
        """Until it answers.

        Raises:
            TimeoutError: It does not, for minutes.
        """
        until = time.monotonic() + _TIMEOUT_S
        with http.client(self.url, timeout_s=5) as client:
            while time.monotonic() < until:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == httpx.codes.OK:
                        return
                time.sleep(_POLL_S)
        raise TimeoutError(f"the server was not healthy within {_TIMEOUT_S:.0f} s")

    def stop(self) -> None:
        """End what is left of it."""
        self._life.close()
        self._server = None

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _api(self) -> psutil.Process:
        assert self._server is not None, "start comes first"
        process = psutil.Process(self._server.pid)
        if not self._supervised:
            return process
        # Between a crash and the next life the supervisor has no child.
        self.wait_healthy()
        (api,) = process.children()
        return api

    def _find(self, which: Process) -> psutil.Process:
        api = self._api()
        if which == "api":
            return api
        if which == "supervisor":
            return api.parent()
        found = [
            process
            for process in api.children(recursive=True)
            if which in " ".join(process.cmdline())
        ]
        if not found:
            raise RuntimeError(f"the server has no process with {which} in its name")
        return found[0]
