"""What needs no SGLang to be told is told before it is imported."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stateful_sglang.server import preflight

LAUNCH_AND_LIST = """
import sys
from stateful_sglang import launch
status = launch.main(sys.argv[1:])
heavy = {"sglang", "torch", "transformers", "numpy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else status)
"""
SHOW_HELP = """
import sys
from stateful_sglang import launch
try:
    launch.main(["--help"])
except SystemExit:
    heavy = {"sglang", "torch", "transformers", "numpy"} & set(sys.modules)
    sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH_AND_LIST, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "{port}"], "cannot listen on 127.0.0.1:{port}"),
        (["--port={port}", "--tp", "2"], "cannot listen on 127.0.0.1:{port}"),
        (["--config", "{config}"], "cannot listen on 127.0.0.1:{port}"),
        (["--config={config}"], "cannot listen on 127.0.0.1:{port}"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--port", "0", "--model-path", "/no/such/model"], "/no/such/model does not exist"),
        (["--port", "0", "--model", "/no/such/model"], "/no/such/model does not exist"),
        (["--pin-budget", "2"], "--pin-budget is 2.0"),
        (["--max-draft", "0"], "--max-draft is 0"),
        (["--port", "0", "--pp-size", "2"], "--pp-size 2 cannot be combined with sessions"),
    ],
)
def test_it_is_refused_without_an_import(
    arguments: list[str], message: str, taken: int, tmp_path: Path
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"port: {taken}\nenable_metrics: true\nlora-paths: [a, b]\n")
    ran = launch(*(word.format(port=taken, config=config) for word in arguments))
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("stateful_sglang: ")
    assert message.format(port=taken) in ran.stderr


def test_help_imports_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SHOW_HELP], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "--stateful" in ran.stdout


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("port: 1\nhost: 0.0.0.0\n")
    given = preflight.written_out(["--config", str(config), "--port", "2"])
    assert given == {"port": 2, "host": "0.0.0.0"}


@pytest.mark.parametrize("text", ["- a list", "port: [", "\x00"])
def test_a_file_that_is_none_is_left_to_sglangs_parser(text: str, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(text)
    assert preflight.written_out(["--config", str(config)]) == {}
    assert preflight.written_out(["--config", str(tmp_path / "missing.yaml")]) == {}


def test_other_arguments_and_their_values_are_passed_over() -> None:
    assert preflight.written_out(["--tp", "2", "--lora-paths", "a", "b", "--por", "1"]) == {}
