"""`stateful-sglang sessions` against the real routes: tables, JSON, files and exit statuses."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_double import EngineDouble
from failing_journal import FailingJournal
from session_server import running
from typer.testing import CliRunner

from stateful_sglang import cli
from stateful_sglang.client import Client
from stateful_sglang.client.terminal import app


@pytest.fixture
def server() -> Iterator[tuple[str, EngineDouble, FailingJournal]]:
    with running() as given:
        yield given


def run(url: str, *arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, [*arguments, "--url", url], **options)


def of_json(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_sessions_are_listed_a_line_each_or_as_json(server: Any) -> None:
    url, _, _ = server
    with Client(url) as client:
        ids = [client.open(metadata={"n": str(n)}).id for n in range(3)]
        client.session(ids[0]).close()
    lines = run(url, "ls").stdout.splitlines()
    assert {line.split("\t")[0] for line in lines} == set(ids[1:])
    assert len(lines[0].split("\t")) == 7
    assert len(of_json(run(url, "ls", "--json", "--limit", "1"))) == 1
    (found,) = of_json(run(url, "ls", "--json", "--metadata", "n=2"))
    assert found["id"] == ids[2]
    (closed,) = of_json(run(url, "ls", "--json", "--state", "closed"))
    assert closed["id"] == ids[0]
    for wrong in (["--state", "gone"], ["--metadata", "n"]):
        assert run(url, "ls", *wrong).exit_code == 2


def test_people_see_a_table(server: Any) -> None:
    url, _, _ = server
    with Client(url) as client:
        session = client.open(metadata={"title": "[red]\x1b[31mx"})
        session.append("hello \x1b]0;evil\x07")
    env = {"FORCE_COLOR": "1", "COLUMNS": "200"}
    listed = run(url, "ls", env=env).stdout
    assert "metadata" in listed
    assert "[red]" in listed
    shown = run(url, "show", session.id, env=env).stdout
    assert "user" in shown
    assert "\x1b]0" not in shown + listed
    assert "\x07" not in shown


def test_a_session_is_shown_with_what_was_said(server: Any) -> None:
    url, _, _ = server
    with Client(url) as client:
        session = client.open(system="Be terse.")
        turn = session.append("hello")
        session.ingest("and?")
    text = run(url, "show", session.id).stdout
    assert "version\t2" in text
    for line in ("system\tBe terse.", "user\thello", f"assistant\t{turn.text}", "user (pending)\t"):
        assert line in text
    shown = of_json(run(url, "show", session.id, "--json", "--version", "1"))
    assert shown["messages"]["version"] == 1


def test_forking_rolling_back_and_closing(server: Any) -> None:
    url, _, journal = server
    with Client(url) as client:
        session = client.open()
        session.append("one")
        session.append("two")
    forked = run(url, "fork", session.id, "--version", "1").stdout.strip()
    assert of_json(run(url, "show", forked, "--json"))["forked_from"] == {
        "id": session.id,
        "version": 1,
    }
    assert of_json(run(url, "fork", session.id, "--json"))["version"] == 2
    assert "at version 1" in run(url, "rollback", session.id, "1").stdout
    assert of_json(run(url, "rollback", session.id, "2", "--json"))["version"] == 2
    assert "erased" in run(url, "close", session.id, "--erase").stdout
    assert of_json(run(url, "close", forked, "--json"))["closed"]
    assert journal.erased == [session.id]


def test_an_export_is_a_file_for_its_owner_alone_and_can_be_imported(
    server: Any, tmp_path: Path
) -> None:
    url, engine, _ = server
    with Client(url) as client:
        session = client.open()
        session.append("hello")
    file = tmp_path / "session.json"
    file.touch(mode=0o644)
    assert run(url, "export", session.id, str(file)).exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    imported = run(url, "import", str(file)).stdout.strip()
    assert of_json(run(url, "show", imported, "--json"))["version"] == 1
    piped = run(url, "import", "-", "--json", input=run(url, "export", session.id, "-").stdout)
    assert of_json(piped)["version"] == 1
    engine.model_digest = "another"
    refused = run(url, "import", str(file))
    assert refused.exit_code == 1
    assert "Model or chat template differ" in refused.stderr
    taken = run(url, "import", str(file), "--accept-other-model", "--json")
    assert of_json(taken)["tokens"] == 0


def test_a_session_is_followed_until_it_ends(server: Any) -> None:
    url, _, _ = server
    with Client(url) as client:
        session = client.open()
        events = session.events()
        results: list[Any] = []
        tail = threading.Thread(
            target=lambda: results.append(run(url, "tail", session.id, "--json"))
        )
        tail.start()
        service_hears_two(client, session.id)
        session.append("hello")
        session.close()
        tail.join()
        assert [event.name for event in events][-1] == "closed"
    told = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert told[0]["event"] == "listening"
    assert told[-1] == {"event": "closed", "version": 1, "erased": False}


def service_hears_two(client: Client, session_id: str) -> None:
    """Touch the session until whoever was about to listen has surely heard of it."""
    for _ in range(20):
        client.session(session_id).touch()
        threading.Event().wait(0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nope"], "no open session"),
        (["show", "-e-nope"], "no open session"),
        (["show", "--nope"], "no open session"),
        (["rollback", "nope", "1"], "no open session"),
        (["tail", "nope"], "no open session"),
        (["export", "nope", "x.json"], "no open session"),
        (["close", "nope"], "no open session"),
        (["import", "/nowhere/x.json"], "can't be read"),
        (["import", __file__], "is no exported session"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_status(
    server: Any, arguments: list[str], said: str
) -> None:
    result = run(server[0], *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "ftp://x"])
def test_a_server_that_is_not_there_is_named(url: str) -> None:
    result = run(url, "ls")
    assert result.exit_code == 1
    assert url in result.stderr


def test_the_key_comes_from_the_environment_or_an_option() -> None:
    seen: list[str | None] = []

    def answer(request: Any) -> Any:
        import httpx

        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"sessions": [], "total": 0, "next": None})

    import httpx

    real = httpx.Client

    class Faked(real):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "transport": httpx.MockTransport(answer), "mounts": {}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "Client", Faked)
        run("http://test", "ls", env={"STATEFUL_SGLANG_API_KEY": "secret"})
        run("http://test", "ls", "--api-key", "other")
    assert seen == ["Bearer secret", "Bearer other"]


def test_the_command_is_part_of_ours(server: Any) -> None:
    result = CliRunner().invoke(cli.app, ["sessions", "ls", "--url", server[0], "--json"])
    assert of_json(result) == []
