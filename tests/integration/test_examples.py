"""The examples do what they say against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from docs_examples import examples

from bench.harness.server import Server

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "hello.py": "tokens before",
    "tool_agent.py": "days_between(",
    "streaming.py": "version 1",
    "many_agents.py": "agent 5",
    "curl.sh": '"closed":true',
}
"""Each example, and a part of what it prints."""


def test_every_example_is_run_here_and_listed_in_their_readme() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert files == set(SAYS)
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in readme for name in files)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, server: Server) -> None:
    command = [sys.executable] if name.endswith(".py") else ["bash"]
    ran = subprocess.run(
        [*command, str(EXAMPLES / name), server.url], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert SAYS[name] in ran.stdout


@pytest.mark.parametrize(
    ("language", "program"), [("python", [sys.executable]), ("bash", ["bash"])]
)
def test_the_examples_of_the_page_on_sessions_run(
    language: str, program: list[str], server: Server, tmp_path: Path
) -> None:
    file = tmp_path / f"page.{language}"
    file.write_text(examples(language, server.url))
    ran = subprocess.run(
        [*program, *(["-eu"] if language == "bash" else []), str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
