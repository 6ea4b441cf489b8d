"""`stateful-sglang journal ...`, and where the options of a server put its journal."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from journal_rig import HEAD, opened, run, turn
from typer.testing import CliRunner

from stateful_sglang.cli import app
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import journal
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.session.journal.sqlite import SqliteJournal


def call(*arguments: str):
    return CliRunner().invoke(app, ["journal", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    async def fill(journal: SqliteJournal) -> None:
        for name in ("a", "b"):
            history = await opened(journal, name)
            await turn(journal, history, name, f"said in {name}")
        await opened(journal, "c")
        await journal.end("c", "closed")

    run(tmp_path / "journal.sqlite3", fill)
    return tmp_path / "journal.sqlite3"


def damage(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE commits SET messages = x'00ff' WHERE owner = 'a' AND version = 1")
    db.commit()
    db.close()


def test_checking_a_sound_journal_tells_what_is_in_it(path: Path) -> None:
    before = path.read_bytes()
    result = call("check", "--cache-dir", str(path.parent))
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in result.output.splitlines()]
    assert {
        "sessions open": "2",
        "sessions ended": "1",
        "commits": "4",
        "sound": "yes",
    }.items() <= (dict(each for each in cells if len(each) == 2).items())
    assert path.read_bytes() == before


def test_checking_a_damaged_one_fails_with_what_to_do(path: Path) -> None:
    damage(path)
    result = call("check", "--journal", str(path))
    assert result.exit_code == 1
    assert "session a: a blob is no JSON" in result.output
    assert "journal export FILE" in result.output


@pytest.mark.parametrize("content", [b"", b"something else " * 1000])
def test_checking_what_is_no_journal_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    result = call("check", "--journal", str(tmp_path / "j"))
    assert result.exit_code == 1
    assert str(tmp_path / "j") in result.output
    assert (tmp_path / "j").read_bytes() == content


def test_a_server_that_holds_it_is_named_and_only_checking_goes_on(path: Path) -> None:
    async def use(held: SqliteJournal) -> None:
        history = await held.load("a")
        await turn(held, history, "a", "in the log")
        checked = await asyncio.to_thread(call, "check", "--journal", str(path))
        assert checked.exit_code == 0, checked.output
        assert "in use" in checked.output
        for command in (["vacuum"], ["export", str(path.parent / "out")]):
            refused = await asyncio.to_thread(call, *command, "--journal", str(path))
            assert refused.exit_code == 1
            assert "stop that server first" in refused.output
        await turn(held, history, "a", "goes on")

    run(path, use)


def test_export_writes_a_line_a_session_and_what_is_damaged_says_so(
    path: Path, tmp_path: Path
) -> None:
    damage(path)
    out = tmp_path / "out.jsonl"
    result = call("export", str(out), "--journal", str(path))
    assert result.exit_code == 1
    assert "3 sessions, 1 of them damaged" in result.output
    assert out.stat().st_mode & 0o777 == 0o600
    lines = {each["id"]: each for each in map(json.loads, out.read_text().splitlines())}
    assert "error" in lines["a"]
    assert lines["c"]["state"] == "closed"
    assert lines["b"]["system"] == HEAD.system
    assert lines["b"]["messages"] == [
        {"role": "user", "content": "said in b"},
        {"role": "assistant", "raw": "b ni dias"},
    ]


def test_vacuum_gives_back_what_is_free(path: Path) -> None:
    async def fill(held: SqliteJournal) -> None:
        history = await opened(held, "big")
        await turn(held, history, "big", "".join(map(str, range(100_000))), size=50_000)
        await held.end("big", "closed")

    run(path, fill)
    before = path.stat().st_size
    result = call("vacuum", "--journal", str(path))
    assert result.exit_code == 0, result.output
    assert path.stat().st_size < before / 2
    assert call("check", "--journal", str(path)).exit_code == 0


def test_a_journal_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for command in (["check"], ["vacuum"], ["export", "-"]):
        result = call(*command, "--journal", str(tmp_path / "none"))
        assert result.exit_code == 1
        assert "there is no journal" in result.output
    assert list(tmp_path.iterdir()) == []


def test_options_say_where_it_is(tmp_path: Path) -> None:
    assert journal.path_of("off", tmp_path) is None
    assert journal.path_of(None, tmp_path) == tmp_path / "journal.sqlite3"
    assert journal.path_of("~/j", tmp_path) == Path.home() / "j"


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_server_opens_the_one_of_its_options(tmp_path: Path, on_disk: bool) -> None:
    options = Options(journal=str(tmp_path / "j") if on_disk else "off", journal_sync="normal")
    made = journal.open_journal(options)
    asyncio.run(made.close())
    assert (tmp_path / "j").exists() is on_disk


def test_what_cannot_be_written_is_refused_at_the_start(path: Path, tmp_path: Path) -> None:
    journal.check(Options(journal=str(path)))
    journal.check(Options(journal="off"))
    (tmp_path / "text").write_text("no database, but a text")
    for name, problem in [
        (tmp_path, "it is a folder"),
        (tmp_path / "text", "it is no database"),
        (tmp_path / "text" / "j", "exists|directory"),
    ]:
        with pytest.raises(LaunchError, match=f"(?i){problem}.*--journal off"):
            journal.check(Options(journal=str(name)))
        journal.check(Options(journal=str(name), stateful=False))


def test_a_server_on_anothers_journal_is_refused_at_the_start(path: Path) -> None:
    async def use(held: SqliteJournal) -> None:
        with pytest.raises(LaunchError, match=r"process \d+, since"):
            journal.check(Options(journal=str(path)))

    run(path, use)
