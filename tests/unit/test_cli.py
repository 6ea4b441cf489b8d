"""The command line hands arguments on and turns errors into a line and an exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stateful_sglang import SGLANG_VERSION, launch
from stateful_sglang.cli import app
from stateful_sglang.embedded import cache as model


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_serve_passes_every_argument_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[list[str]] = []
    monkeypatch.setattr(launch, "main", lambda argv: passed.append(argv) or 0)
    arguments = ["--model-path", "m", "--help", "--stateful", "off", "-x"]
    assert run("serve", *arguments).exit_code == 0
    assert passed == [arguments]


def test_serves_exit_status_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "main", lambda argv: launch.EXIT_UNUSABLE)
    assert run("serve").exit_code == launch.EXIT_UNUSABLE


def test_version_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"for sglang {SGLANG_VERSION}" in run("--version").output


def test_model_path_says_where_and_converts_nothing(tmp_path: Path) -> None:
    result = run("model", "path", "--cache-dir", str(tmp_path / "c"))
    assert result.output.strip() == str(model.model_path(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_verifying_what_is_not_there_fails_with_the_remedy(tmp_path: Path) -> None:
    result = run("model", "verify", "--cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "not converted yet" in result.output
    assert "model ensure" in result.output


def test_verify_reads_every_file(tmp_path: Path) -> None:
    def write(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"weights")

    path = model.ensure_default_model(tmp_path, convert=write, say=lambda text: None)
    assert run("model", "verify", "--cache-dir", str(tmp_path)).exit_code == 0
    (path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert run("model", "verify", "--cache-dir", str(tmp_path)).exit_code == 1


def test_a_model_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no-such-package-of-ours")
    result = run("model", "ensure", "--cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert "no-such-package-of-ours" in result.output


def test_an_unknown_action_is_a_usage_error() -> None:
    assert run("model", "destroy").exit_code == 2
