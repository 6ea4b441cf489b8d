"""`stateful-sglang prefixes` against the real routes: files, tables, JSON and exit statuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_double import EngineDouble
from session_server import running
from typer.testing import CliRunner

from stateful_sglang import cli
from stateful_sglang.client.prefixes_terminal import app

TOOLS = [{"type": "function", "function": {"name": "search"}}]


@pytest.fixture
def server() -> Iterator[tuple[str, EngineDouble]]:
    with running() as (url, engine, _):
        yield url, engine


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"Be terse.\r\nBe kind.")
    return file


def run(url: str, *arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, [*arguments, "--url", url], **options)


def of_json(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_file_is_published_byte_for_byte_listed_and_removed(server: Any, prompt: Path) -> None:
    url, engine = server
    added = run(url, "add", str(prompt))
    assert (added.exit_code, added.stderr) == (0, "")
    prefix_id = added.stdout.strip()
    assert "Be terse.\r\nBe kind." in engine.tokenizer.decode(engine.published[prefix_id])
    (line,) = run(url, "ls").stdout.splitlines()
    cells = line.split("\t")
    assert cells[:3] == [prefix_id, "prompt.txt", "published"]
    (listed,) = of_json(run(url, "ls", "--json"))
    assert [str(listed[name]) for name in ("tokens", "aligned_tokens")] == cells[3:5]
    assert "published no longer" in run(url, "rm", prefix_id).stdout
    assert of_json(run(url, "ls", "--json")) == []
    assert engine.published == {}


def test_standard_input_tools_raw_text_and_names(server: Any, tmp_path: Path) -> None:
    url, engine = server
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    first = of_json(run(url, "add", "-", "--tools", str(tools), "--json", input="Be terse."))
    assert '"search"' in engine.tokenizer.decode(engine.published[first["id"]])
    assert first["name"] is None
    raw = of_json(run(url, "add", "-", "--raw", "--name", "a start", "--json", input="Once upon"))
    assert engine.tokenizer.decode(engine.published[raw["id"]]) == "Once upon"
    assert raw["name"] == "a start"
    assert of_json(run(url, "rm", first["id"], "--json"))["id"] == first["id"]


def test_a_last_line_break_is_pointed_out(server: Any, prompt: Path) -> None:
    prompt.write_text("Be terse.\n")
    added = run(server[0], "add", str(prompt), "--json")
    assert of_json(added)["state"] == "published"
    assert "ends with a line break" in added.stderr


def test_people_see_a_table(server: Any, prompt: Path) -> None:
    url, _ = server
    run(url, "add", str(prompt), "--name", "[red]\x1b[31mx")
    shown = run(url, "ls", env={"FORCE_COLOR": "1", "COLUMNS": "200"}).stdout
    assert "shared" in shown
    assert "[red]" in shown
    assert "\x1b[31mx" not in shown


def test_what_goes_wrong_is_one_line(server: Any, prompt: Path, tmp_path: Path) -> None:
    url, engine = server
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "object.json").write_text("{}")
    engine.refuse_prefixes = "there is no room"
    for arguments, said in [
        (["add", str(prompt)], "there is no room"),
        (["add", str(tmp_path / "none")], "can't be read"),
        (["add", str(tmp_path / "bytes")], "no text in UTF-8"),
        (["add", str(prompt), "--tools", str(tmp_path / "object.json")], "no list of tools"),
        (["add", str(prompt), "--tools", str(prompt)], "is no JSON"),
        (["rm", "-nothing"], "no published prefix has the id"),
    ]:
        result = run(url, *arguments)
        assert result.exit_code == 1, arguments
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert run(url, "add", str(prompt), "--raw", "--tools", str(prompt)).exit_code == 2
    assert run("http://127.0.0.1:9", "ls").exit_code == 1


def test_the_command_is_found_by_its_name() -> None:
    result = CliRunner().invoke(cli.app, ["prefixes", "--help"])
    assert result.exit_code == 0
    assert "add" in result.output
