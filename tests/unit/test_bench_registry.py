"""A bench is a file: its command, its line in the list and its help follow from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import bench.__main__ as command
from bench import corpus, suites
from bench.harness import http
from bench.harness.figures import report

SOURCE = '''"""Counts what it is told.

    python -m bench counting --number 3
"""

from __future__ import annotations

from bench.harness.figures import report
from bench.harness.options import Json


def main(number: int = 1, json: Json = None) -> int:
    """Report the number; exit status 1 above 3."""
    report({"number": number}, json)
    return int(number > 3)
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench more, in a folder of its own."""
    (tmp_path / "counting.py").write_text(SOURCE)
    (tmp_path / "_help.py").write_text("")
    monkeypatch.setattr(suites, "FOLDER", tmp_path)
    monkeypatch.setattr(suites, "__path__", [str(tmp_path)])


def status(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    return ended.value.code


@pytest.mark.usefixtures("counting")
def test_a_new_file_is_a_new_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--list") == 0
    assert capsys.readouterr().out == "counting  Counts what it is told.\n"
    assert status("counting", "--number", "3", "--json", str(tmp_path / "c.json")) == 0
    assert json.loads((tmp_path / "c.json").read_text())["figures"] == {"number": 3}
    assert status("counting", "--number", "4") == 1
    assert status("counting", "--help") == 0
    assert "\n      python -m bench counting --number 3\n" in capsys.readouterr().out


def test_every_bench_has_a_line_in_the_list_and_writes_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    assert {"engine", "exactness", "demo", "trees"} <= set(suites.names())
    for name in suites.names():
        assert len(suites.description(name)) > 20
        assert status(name, "--help") == 0
        assert "--json FILE" in capsys.readouterr().out, name


def test_an_unknown_bench_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("speed") == 2
    assert "speed" in capsys.readouterr().err


def test_figures_are_a_flat_object_and_what_was_not_measured_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report({"a": 1.5, "b": None}, tmp_path / "f.json", more={"x": [1]})
    written = json.loads((tmp_path / "f.json").read_text())
    assert written == {"figures": {"a": 1.5, "b": None}, "more": {"x": [1]}}
    assert "b not measured" in capsys.readouterr().out


def test_figures_that_json_does_not_know_are_written_as_null(tmp_path: Path) -> None:
    report({"a": float("inf")}, tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text()) == {"figures": {"a": None}}


def test_the_corpus_stays_as_it_was_frozen() -> None:
    files = sorted(path for path in corpus.REPOSITORY.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(corpus.REPOSITORY)}\0".encode() + path.read_bytes())
    assert (len(files), digest.hexdigest()[:16]) == (32, "bc59672797e5862a")


def test_excerpts_are_different_and_full() -> None:
    found = corpus.excerpts(40)
    assert len(set(found)) == 40
    assert {len(text) for text in found} == {400}
    with pytest.raises(ValueError, match="has room for"):
        corpus.excerpts(1000)


def test_loopback_is_reached_without_the_environments_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org,localhost")
    assert http.client("http://127.0.0.1:8")._mounts == {}
    assert http.direct_loopback()["no_proxy"] == "example.org,localhost,127.0.0.1"
