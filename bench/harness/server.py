"""A server process of ours for a bench or a test: started, waited for, ended by its own id."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from bench.harness import http

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
_RUNNING: set[int] = set()
"""Process groups that we started and have not ended."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    pid: int
    log: Path
    """What its processes printed."""
    start_s: float
    """Seconds from starting the process to the first healthy answer."""


class ServerDiedError(RuntimeError):
    """The server ended, or did not get ready in time; the message ends with its log."""


def end_with_us() -> None:
    """Have servers end when a signal asks this process to, which would leave them behind."""

    def end(number: int, _: object) -> None:
        for group in list(_RUNNING):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def cpu_seconds(server: Server) -> float:
    """Processor time that a server's processes have taken so far."""
    root = psutil.Process(server.pid)
    return sum(sum(process.cpu_times()[:2]) for process in (root, *root.children(recursive=True)))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(
    *arguments: str, env: Mapping[str, str] | None = None, port: int | None = None
) -> contextlib.AbstractContextManager[Server]:
    """Run ``python -m stateful_sglang.launch`` with ``arguments`` while the context lasts.

    Raises:
        ServerDiedError: It did not become healthy.
    """
    command = (sys.executable, "-m", "stateful_sglang.launch", *arguments, *apart(arguments))
    return serve_command(*command, env=env, port=port)


def apart(arguments: Sequence[str]) -> tuple[str, ...]:
    """What keeps a server apart from the user's own: another journal, and no keys asked for.

    The journal's folder goes when this process ends.
    """
    more: list[str] = []
    if "--journal" not in arguments:
        folder = tempfile.mkdtemp(prefix="stateful-sglang-journal-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        more += ["--journal", str(Path(folder) / "journal.sqlite3")]
    if "--keys" not in arguments:
        more += ["--keys", "off"]
    return tuple(more)


@contextlib.contextmanager
def serve_command(
    *command: str,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
    port: int | None = None,
) -> Iterator[Server]:
    """Run a server while the context lasts: one that takes ``--port`` and answers ``/health``.

    Args:
        command: Without its port.
        env: Added to this process's environment.
        folder: Where it runs; by default here.
        timeout_s: Longest wait for the first healthy answer.
        port: Where it listens; None: chosen here.

    Raises:
        ServerDiedError: It did not become healthy.
    """
    port = port or free_port()
    log = Path(tempfile.mkstemp(prefix="stateful-sglang-", suffix=".log")[1])
    began = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **http.direct_loopback(), **(env or {})},
            cwd=folder,
            start_new_session=True,
        )
    _RUNNING.add(process.pid)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, began, timeout_s)
        yield Server(url, process.pid, log, time.monotonic() - began)
    finally:
        _stop(process)


def _wait(
    process: subprocess.Popen[bytes], url: str, log: Path, began: float, timeout_s: float
) -> None:
    with http.client(url, timeout_s=5) as client:
        while time.monotonic() - began < timeout_s:
            if process.poll() is not None:
                raise ServerDiedError(f"exit status {process.returncode}\n{_tail(log)}")
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == httpx.codes.OK:
                    return
            time.sleep(0.2)
    raise ServerDiedError(f"not healthy after {timeout_s:.0f} s\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group that we started: SGLang's children are in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _RUNNING.discard(process.pid)


def _tail(log: Path, lines: int = 40) -> str:
    text: Sequence[str] = log.read_text(errors="replace").splitlines()
    return "\n".join(text[-lines:])
