"""How a real server ends, in order and by a crash, and comes back: each test has its own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from bench.harness.server import Server, serve

pytestmark = pytest.mark.server

ARGUMENTS = ("--dtype", "float32", "--context-length", "2048")


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@contextlib.contextmanager
def ready(*arguments: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A server whose warm-up is over: before that, a signal ends it at once."""
    with (
        serve(*ARGUMENTS, *arguments) as server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client,
    ):
        until(lambda: "Ready after" in server.log.read_text())
        yield server, client


@contextlib.contextmanager
def streaming(client: httpx.Client, tokens: int) -> Iterator[list[str]]:
    """A turn that is being streamed; the names of its events so far."""
    session = client.post("/v1/sessions", json={}).json()["id"]
    events: list[str] = []
    body = {
        "messages": [{"role": "user", "content": "Tell a story."}],
        "sampling": {"max_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }

    def read() -> None:
        with (
            contextlib.suppress(httpx.TransportError),
            client.stream("POST", f"/v1/sessions/{session}/append", json=body) as reply,
        ):
            events.extend(line[7:] for line in reply.iter_lines() if line.startswith("event: "))

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: bool(busy(client)))
    yield events
    thread.join(120)


def busy(client: httpx.Client) -> list[str]:
    """The sessions in which a turn runs."""
    return [each["id"] for each in client.get("/v1/sessions").json()["sessions"] if each["busy"]]


@pytest.mark.parametrize(
    ("number", "bound", "tokens", "last"),
    [(signal.SIGTERM, "60", 100, "done"), (signal.SIGINT, "1", 1500, "error")],
)
def test_a_signal_lets_a_turn_end_within_the_bound_and_refuses_new_ones(
    number: signal.Signals, bound: str, tokens: int, last: str
) -> None:
    with ready("--drain-s", bound) as (server, client):
        process = psutil.Process(server.pid)
        started = process.children(recursive=True)
        assert started
        with streaming(client, tokens) as events:
            os.kill(server.pid, number)
            until(lambda: client.get("/health").status_code == 503)
            for path, body in (("/v1/sessions", {}), ("/generate", {"text": "Hello"})):
                refused = client.post(path, json=body)
                assert refused.status_code == 503, path
                assert refused.json()["error"]["type"] == "draining"
                assert int(refused.headers["retry-after"]) >= 1
        assert events[-1] == last
        assert process.wait(60) == 0
        until(lambda: all(gone(each) for each in started))


def test_a_server_whose_scheduler_is_killed_answers_again_at_the_same_address() -> None:
    with ready("--restart", "on-crash") as (server, client):
        supervisor = psutil.Process(server.pid)
        started = supervisor.children(recursive=True)
        (scheduler,) = [each for each in started if "scheduler" in " ".join(each.cmdline())]
        scheduler.kill()
        until(lambda: "the server crashed" in server.log.read_text())

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/health").status_code == httpx.codes.OK
            return False

        until(answers, 300)
        assert client.post("/v1/sessions", json={}).status_code == 201
        assert all(gone(each) for each in started)
        log = server.log.read_text()
        assert log.count("stateful_sglang: the server crashed") == 1
        assert "killed by SIGKILL" in log
        until(lambda: server.log.read_text().count("Ready after") == 2)
        again = supervisor.children(recursive=True)
        os.kill(server.pid, signal.SIGTERM)
        assert supervisor.wait(60) == 0
        until(lambda: all(gone(each) for each in again))
