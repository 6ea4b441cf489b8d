"""docs/sessions.md: its examples run, and what it names exists."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_examples import PAGE, examples
from engine_double import EngineDouble
from session_server import served

from stateful_sglang.client import terminal

pytestmark = pytest.mark.anyio


async def run(tmp_path: Path, *command: str) -> str:
    def ran() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
        )

    result = await asyncio.to_thread(ran)
    assert result.returncode == 0, result.stderr
    return result.stdout


async def test_the_examples_in_python_run(tmp_path: Path) -> None:
    async with served(EngineDouble()) as url:
        code = f"import sys; sys.path[:0] = {sys.path!r}\n{examples('python', url)}"
        out = await run(tmp_path, sys.executable, "-c", code)
    assert "somebody was here first: the session is at version 2" in out
    assert "touched {'version': " in out


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_examples_with_curl_run(tmp_path: Path) -> None:
    async with served(EngineDouble()) as url:
        out = await run(tmp_path, "bash", "-euo", "pipefail", "-c", examples("bash", url))
    assert '"erased":true' in out
    assert (tmp_path / "exported.json").read_text().startswith('{"format"')


def test_the_commands_are_those_that_exist() -> None:
    listed = re.findall(r"^stateful-sglang sessions (\w+)", PAGE.read_text(), re.MULTILINE)
    commands = [each.name or each.callback.__name__ for each in terminal.app.registered_commands]
    assert sorted(listed) == sorted(commands)


def test_links_lead_to_pages_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE.read_text())
    assert [link for link in links if not (PAGE.parent / link).is_file()] == []
