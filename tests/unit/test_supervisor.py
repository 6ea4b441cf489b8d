"""A supervised server comes back after a crash, and only then; nothing of it is left behind.

Supervisor, server and the server's own children are real processes; the server is a small script.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from stateful_sglang.server import supervisor
from stateful_sglang.server.errors import EXIT_UNUSABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes as Linux can")

SUPERVISOR = """
import sys
from stateful_sglang.server.supervisor import Patience, run
patience = Patience(first_delay_s=0.01, most_delay_s=0.04, stable_s=60, most_unready=3)
sys.exit(run([sys.executable, "-c", open(sys.argv[1]).read(), *sys.argv[2:]], patience))
"""
SERVER = """
import os, pathlib, signal, socket, subprocess, sys, time
from stateful_sglang.server.supervisor import tell_ready
lives = pathlib.Path("lives")
with lives.open("a") as file:
    file.write(f"{os.getpid()}\\n")
life = len(lives.read_text().splitlines())
def crash():
    os.kill(os.getpid(), signal.SIGKILL)
def answer(port=0):
    tell_ready("127.0.0.1", port)
    pathlib.Path(f"ready{life}").touch()
def stay():
    while True:
        time.sleep(1)
"""


@contextlib.contextmanager
def supervised(folder: Path, server: str) -> Iterator[subprocess.Popen[str]]:
    """A supervisor of a server that runs `SERVER` and then this."""
    script = folder / "server.py"
    script.write_text(SERVER + server)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(script)],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
        process.communicate()


def ended(folder: Path, server: str) -> tuple[int, str]:
    """Exit status of the supervisor, and what it said."""
    with supervised(folder, server) as process:
        said = process.communicate(timeout=60)[1]
        return process.returncode, said


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def lives(folder: Path) -> list[int]:
    """Process ids of the servers so far."""
    return [int(line) for line in (folder / "lives").read_text().split()]


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_server_that_crashes_is_started_again_until_it_ends_in_order(tmp_path: Path) -> None:
    status, said = ended(tmp_path, "answer()\nif life < 4: crash()")
    assert status == 0
    assert len(lives(tmp_path)) == 4
    lines = said.splitlines()
    assert len(lines) == 3
    assert "killed by SIGKILL" in lines[0]
    delays = [line.rsplit(" in ", 1)[1] for line in lines]
    assert delays == ["0.01 s", "0.02 s", "0.04 s"]


@pytest.mark.parametrize("status", [0, EXIT_UNUSABLE])
def test_an_orderly_end_and_a_start_that_cannot_work_are_no_crashes(
    tmp_path: Path, status: int
) -> None:
    assert ended(tmp_path, f"sys.exit({status})") == (status, "")
    assert len(lives(tmp_path)) == 1


def test_servers_that_crash_before_they_ever_answer_are_given_up(tmp_path: Path) -> None:
    status, said = ended(tmp_path, "sys.exit(7)")
    assert status == 1
    assert len(lives(tmp_path)) == 3
    assert "crashed 3 times in a row before it answered, last exit status 7" in said


def test_a_server_that_answered_between_crashes_is_not_given_up(tmp_path: Path) -> None:
    status, _ = ended(tmp_path, "if life % 2: answer()\nif life < 9: crash()")
    assert status == 0
    assert len(lives(tmp_path)) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_server_whose_end_is_the_supervisors(
    tmp_path: Path, number: signal.Signals
) -> None:
    server = f"""
def end(*_):
    pathlib.Path("told").touch()
    sys.exit(0)
signal.signal({int(number)}, end)
answer()
stay()
"""
    with supervised(tmp_path, server) as process:
        until((tmp_path / "ready1").exists)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "told").exists()
    assert len(lives(tmp_path)) == 1


def test_a_server_that_dies_of_being_told_to_stop_stays_dead(tmp_path: Path) -> None:
    with supervised(
        tmp_path, "signal.signal(signal.SIGTERM, lambda *_: crash())\nanswer(); stay()"
    ) as process:
        until((tmp_path / "ready1").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    assert len(lives(tmp_path)) == 1


def test_whatever_a_dead_server_started_is_gone_before_the_next_one_starts(tmp_path: Path) -> None:
    # In a session of its own, deaf to signals, with the port and the lock: nothing lets go early.
    holder = """
import fcntl, signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("holds", flush=True)
time.sleep(1000)
"""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = f"""
holder = subprocess.Popen([sys.executable, "-c", {holder!r}, "{port}"], start_new_session=True,
    stdout=subprocess.PIPE, text=True)
assert holder.stdout.readline() == "holds\\n"
pathlib.Path(f"holder{{life}}").write_text(str(holder.pid))
answer({port})
if life < 3:
    crash()
"""
    status, said = ended(tmp_path, server)
    assert status == 0, said
    assert len(lives(tmp_path)) == 3
    assert all(gone(int((tmp_path / f"holder{life}").read_text())) for life in (1, 2, 3))


def test_killing_the_supervisor_ends_the_server(tmp_path: Path) -> None:
    with supervised(tmp_path, "answer(); stay()") as process:
        until((tmp_path / "ready1").exists)
        (pid,) = lives(tmp_path)
        process.kill()
        until(lambda: gone(pid))


def test_a_signal_during_the_delay_ends_the_wait() -> None:
    patience = "Patience(first_delay_s=1000)"
    code = (
        "import sys; from stateful_sglang.server.supervisor import Patience, run; "
        f"sys.exit(run([sys.executable, '-c', 'import sys; sys.exit(3)'], {patience}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "starting it again in 1000 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=60) == 0
    process.stderr.close()


def test_the_supervisor_stays_small() -> None:
    code = (
        "import sys, stateful_sglang.launch; "
        "sys.exit(str({'sglang', 'torch', 'fastapi', 'transformers'} & set(sys.modules) or ''))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not ran.stderr.strip()


def test_a_command_line_that_cannot_work_is_no_crash() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "stateful_sglang.launch", "--restart", "on-crash", "--pin-budget=2"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == EXIT_UNUSABLE
    ran = subprocess.run(
        [sys.executable, "-m", "stateful_sglang.launch", "--restart", "on-crash", "--port", "-1"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == EXIT_UNUSABLE, ran.stderr
    assert ran.stderr.count("stateful_sglang: ") == 1
    assert "cannot listen on" in ran.stderr


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor.sys, "platform", "darwin")
    with pytest.raises(supervisor.LaunchError, match="only Linux has"):
        supervisor.check()
