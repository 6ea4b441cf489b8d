"""A server that comes back: a child process of this one, started again when it has crashed.

When one of its processes dies, SGLang kills the whole server: the API process ends by SIGKILL. An
orderly end (status 0, a signal that asks for it) and a start that can't work (`EXIT_UNUSABLE`) are
no crashes. This module imports nothing of SGLang or torch: it stays small while the server is big.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from stateful_sglang.server import lifetime, machine
from stateful_sglang.server.errors import EXIT_UNUSABLE, LaunchError

READY_ENV = "STATEFUL_SGLANG_READY_FD"
"""File descriptor on which a supervised server says where it answers, once it does."""
_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_PASSED_ON = _STOPPING | {signal.SIGUSR1, signal.SIGUSR2}
_WATCHED = _PASSED_ON | {signal.SIGCHLD}
_ORDERLY = frozenset(
    {0, EXIT_UNUSABLE}
    | {-number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    | {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
)
_POLL_S = 0.5
_SWEEP_POLL_S = 0.02
_FREE_TIMEOUT_S = 60.0


class Patience(NamedTuple):
    """How soon, and how often, a crashed server is started again."""

    first_delay_s: float = 1.0
    most_delay_s: float = 30.0
    """Delays double from crash to crash, up to this."""
    stable_s: float = 60.0
    """A server that lived so long has the first delay again."""
    most_unready: int = 10
    """Crashes in a row of servers that never answered, after which this is given up."""


class _Life(NamedTuple):
    status: int
    """Exit status; the negative number of the signal that ended it."""
    seconds: float
    address: tuple[str, int] | None
    """Where it answered; None where it never did."""


def check() -> None:
    """Refuse where processes can't be watched as this module does.

    Raises:
        LaunchError: This is no Linux.
    """
    if sys.platform != "linux":
        raise LaunchError(
            f"--restart on-crash watches the server with what only Linux has; this is "
            f"{sys.platform}. Leave it out, and let another supervisor start the server again"
        )


def tell_ready(host: str, port: int) -> None:
    """Tell the supervisor, if there is one, that this server answers."""
    number = os.environ.pop(READY_ENV, "")
    if number.isdigit():
        with contextlib.suppress(OSError), open(int(number), "w") as pipe:
            pipe.write(f"{port} {host}\n")


def run(command: Sequence[str], patience: Patience | None = None) -> int:
    """Keep a server running until it ends in an orderly way; signals are passed on to it.

    The calling process is this server's alone: every descendant of it is ended with the server.

    Args:
        command: Starts the server, in a session of its own.
        patience: None for the defaults.

    Returns:
        The server's exit status; 1 where it was given up.
    """
    return _Supervisor(command, patience or Patience()).run()


class _Supervisor:
    def __init__(self, command: Sequence[str], patience: Patience) -> None:
        self._command = list(command)
        self._patience = patience
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None
        lifetime.adopt_orphans()
        # Blocked, and taken one by one by `sigtimedwait`: none is lost, and none interrupts.
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

    def run(self) -> int:
        delay, unready = self._patience.first_delay_s, 0
        while True:
            life = self._live()
            self._sweep()
            if self._stopping or life.status in _ORDERLY:
                return life.status if life.status >= 0 else 128 - life.status
            unready = 0 if life.address else unready + 1
            if unready >= self._patience.most_unready:
                _say(
                    f"the server crashed {unready} times in a row before it answered, last "
                    f"{_end_of(life.status)}; given up. What it printed above says why; start it "
                    "without --restart on-crash to look into it"
                )
                return 1
            if life.seconds >= self._patience.stable_s:
                delay = self._patience.first_delay_s
            _say(
                f"the server crashed after {life.seconds:.0f} s ({_end_of(life.status)}); "
                f"starting it again in {delay:g} s"
            )
            self._wait(delay)
            if life.address is not None:
                self._wait_for_port(*life.address)
            if self._stopping:
                return 0
            delay = min(2 * delay, self._patience.most_delay_s)

    def _live(self) -> _Life:
        """Start the server and wait until its first process has ended."""
        ready, told = os.pipe()
        os.set_blocking(ready, False)  # A descendant that lives on may hold the other end.
        began = time.monotonic()
        try:
            self._child = child = self._start(told)
        finally:
            os.close(told)
        while child.poll() is None:
            self._next_signal(_POLL_S)
            self._reap_others(child.pid)
        self._child = None
        try:
            answer = os.read(ready, 1024).decode()
        except BlockingIOError:
            answer = ""
        os.close(ready)
        port, _, host = answer.strip().partition(" ")
        address = (host, int(port)) if port.isdigit() else None
        return _Life(child.returncode, time.monotonic() - began, address)

    def _start(self, told: int) -> subprocess.Popen[bytes]:
        parent, mask = os.getpid(), self._mask_before

        def enter() -> None:
            lifetime.end_with_parent(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        return subprocess.Popen(
            self._command,
            env={**os.environ, READY_ENV: str(told)},
            pass_fds=(told,),
            start_new_session=True,
            preexec_fn=enter,  # Safe: this process has one thread.
        )

    def _next_signal(self, seconds: float) -> None:
        """Wait for a signal, at most so long, and pass it on."""
        got = signal.sigtimedwait(_WATCHED, seconds)
        if got is None or got.si_signo == signal.SIGCHLD:
            return
        self._stopping = self._stopping or got.si_signo in _STOPPING
        if self._child is not None:
            self._child.send_signal(got.si_signo)

    def _reap_others(self, server: int) -> None:
        """Take leave of adopted descendants that have ended, but not of the server itself."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == server:
                return
            os.waitpid(ended.si_pid, 0)

    def _sweep(self) -> None:
        """End every descendant that is left, and wait until the last one is gone.

        With them go the port and the locks of files that they held.
        """
        this = psutil.Process()
        told_at = time.monotonic() + _FREE_TIMEOUT_S
        while True:
            for process in this.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            if time.monotonic() > told_at:
                left = ", ".join(str(process.pid) for process in this.children(recursive=True))
                _say(f"processes of the dead server do not end: {left}; still waiting for them")
                told_at = time.monotonic() + _FREE_TIMEOUT_S
            time.sleep(_SWEEP_POLL_S)

    def _wait(self, seconds: float) -> None:
        """Wait, unless a signal asks to stop."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._next_signal(left)

    def _wait_for_port(self, host: str, port: int) -> None:
        until = time.monotonic() + _FREE_TIMEOUT_S
        while machine.port_problem(host, port) and time.monotonic() < until and not self._stopping:
            self._wait(_POLL_S)


def _end_of(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _say(what: str) -> None:
    print(f"stateful_sglang: {what}", file=sys.stderr, flush=True)
