"""A bench that is told to end takes its servers with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

SERVER = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Healthy).serve_forever()
"""
BENCH = """
import sys, time
from bench.harness.command import run
from bench.harness.server import serve_command
def main() -> None:
    with serve_command(sys.executable, {server!r}) as server:
        print(server.pid, flush=True)
        time.sleep(600)
run(main)
"""


def test_a_bench_that_is_told_to_end_leaves_no_server(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(SERVER)
    code = BENCH.format(server=str(server))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        started = psutil.Process(int(bench.stdout.readline()))
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(30) == 128 + signal.SIGTERM
        psutil.wait_procs([started], timeout=30)
        assert not started.is_running()
