"""The end of a server: running requests finish, new ones are refused, and it is over in time.

The server is a process of its own with uvicorn's real handling of signals; only the engine behind
it is a stand-in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from stateful_sglang.server import drain

SERVER = """
import asyncio, pathlib, sys, uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse
from stateful_sglang.server import drain

port, bound, extra = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
drain.ABORT_S, drain.STOP_S, drain.FLUSH_S = 1, 1, 1
app = FastAPI()
go = asyncio.Event()

@app.post("/work")
async def work(): await go.wait(); return {"aborted": engine.aborted}

@app.post("/abort_request")
async def abort(): go.set()

@app.get("/read")
async def read(): return {}

@app.get("/endless")
async def endless():
    async def lines():
        while True:
            yield "line\\n"
            await asyncio.sleep(0.05)
    return StreamingResponse(lines())

def done(what):
    with open("done", "a") as file:
        file.write(what + "\\n")

class StandInEngine:
    aborted = False
    def busy(self): return False
    def abort_all(self):
        done("aborted"); self.aborted = True
        if extra != "stuck": go.set()
    async def stop(self):
        done("stopped"); server.should_exit = extra != "hangs"
        if extra == "fails": raise RuntimeError("no scheduler answers")
    def kill(self): done("killed")

async def begin(): done("begun")
async def end():
    done("ended")
    if extra == "full": raise OSError("no space left")

engine = StandInEngine()
ending = drain.Drain(bound, begin, end)
ending.attach(app)
ending.follow(engine)
if extra != "starting":
    ending.ready()
server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
server.run()
sys.exit(ending.status)
"""


class Served(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    folder: Path

    def ask(self, method: str, path: str) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=60, trust_env=False)

    def done(self) -> list[str]:
        """What the drain did, in its order."""
        return (self.folder / "done").read_text().split()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal and wait until the drain has begun; where nothing runs, it may be over."""
        self.process.send_signal(number)
        with contextlib.suppress(httpx.TransportError):
            while self.ask("GET", "/health").status_code != 503:
                time.sleep(0.02)


@contextlib.contextmanager
def served(folder: Path, bound: float = 60, extra: str = "") -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port), str(bound), extra],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    running = Served(process, f"http://127.0.0.1:{port}", folder)
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                running.ask("GET", "/read")
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield running
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def working(server: Served, path: str = "/work") -> Iterator[list[httpx.Response | Exception]]:
    """A request that runs meanwhile; what came of it, at the end."""
    came: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            came.append(server.ask("GET" if path == "/endless" else "POST", path))
        except httpx.HTTPError as error:
            came.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)  # The server has it: nothing tells so from outside.
    yield came
    thread.join(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_ends_well_and_what_is_new_is_refused(
    tmp_path: Path, number: signal.Signals
) -> None:
    with served(tmp_path) as server:
        with working(server) as came:
            server.signal(number)
            refused = server.ask("POST", "/work")
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
            assert server.ask("GET", "/read").status_code == 200
            assert server.ask("POST", "/abort_request").status_code == 200
        assert server.process.wait(60) == 0
    (reply,) = came
    assert isinstance(reply, httpx.Response)
    assert reply.json() == {"aborted": False}
    assert server.done() == ["begun", "ended", "stopped"]


def test_what_runs_longer_than_the_bound_is_aborted(tmp_path: Path) -> None:
    with served(tmp_path, bound=0.2) as server:
        with working(server) as came:
            server.signal()
        assert server.process.wait(60) == 0
    (reply,) = came
    assert isinstance(reply, httpx.Response)
    assert reply.json() == {"aborted": True}
    assert server.done() == ["begun", "aborted", "ended", "stopped"]


@pytest.mark.parametrize(("path", "extra"), [("/endless", ""), ("/work", "stuck")])
def test_connections_that_would_never_end_are_hung_up(
    tmp_path: Path, path: str, extra: str
) -> None:
    with served(tmp_path, bound=0.2, extra=extra) as server:
        with working(server, path):
            server.signal()
        assert server.process.wait(60) == 0
    assert server.done()[-2:] == ["ended", "stopped"]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with served(tmp_path) as server, working(server):
        server.signal()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM
    assert server.done() == ["begun", "killed"]


def test_a_server_that_is_not_ready_has_nothing_to_wait_for(tmp_path: Path) -> None:
    with served(tmp_path, extra="starting") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert server.done() == ["killed"]


@pytest.mark.parametrize(
    ("extra", "done"),
    [
        ("full", ["begun", "ended", "stopped"]),
        ("fails", ["begun", "ended", "stopped", "killed"]),
    ],
)
def test_an_end_that_fails_is_an_end_with_status_1(
    tmp_path: Path, extra: str, done: list[str]
) -> None:
    with served(tmp_path, extra=extra) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
    assert server.done() == done


def test_an_end_that_hangs_is_cut_off(tmp_path: Path) -> None:
    with served(tmp_path, bound=0.2, extra="hangs") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert server.done() == ["begun", "ended", "stopped", "killed"]


def test_a_websocket_is_refused_while_draining() -> None:
    app = FastAPI()

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    ending = drain.Drain(1)
    app.add_middleware(drain._Guard, drain=ending)
    client = TestClient(app)
    with client.websocket_connect("/live") as socket_:
        assert socket_.receive_text() == "hello"
    ending.draining = True
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/live"):
        pass
    assert closed.value.code == 1013
