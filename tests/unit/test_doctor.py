"""The doctor finds what would fail, says what to do, and never fails itself."""

from __future__ import annotations

import builtins
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from stateful_sglang import cache_folder, doctor
from stateful_sglang.attachments import check as attachments
from stateful_sglang.cpu import extension
from stateful_sglang.doctor import Finding, examine, hardware, healthy, render, software
from stateful_sglang.embedded import cache as model
from stateful_sglang.server.machine import Machine


@pytest.fixture(autouse=True)
def _sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A converted model and attachments that hold, so that each test breaks one thing."""
    monkeypatch.setenv(cache_folder.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(attachments, "check", lambda: [status("a.b", "1", "1")])

    def write(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"weights")

    model.ensure_default_model(convert=write, say=lambda text: None)


def status(target: str, expected: str, found: str | None) -> attachments.AttachmentStatus:
    attachment = attachments.Attachment(target, "hook", "a reason")
    return attachments.AttachmentStatus(attachment, expected, found)


def finding(name: str, port: int = 0) -> Finding:
    (found,) = [each for each in examine(port) if each.name == name]
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package in changed:
            value = changed[package]
            if value is None:
                raise metadata.PackageNotFoundError(package)
            return value
        return real(package)

    monkeypatch.setattr(metadata, "version", version)


def breaking_import(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.__import__

    def fail(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted == name:
            raise ImportError(f"lib{name}.so: cannot open shared object file")
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_a_sound_machine_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    findings = render(examine(0))
    assert findings
    assert healthy(findings), findings
    assert capsys.readouterr().out.splitlines()[-1] == "ready to serve"


def test_missing_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, sglang=None)
    assert finding("sglang").verdict == "fail"
    assert "missing" in finding("sglang").found
    assert finding("attachments").verdict == "fail"


def test_another_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, sglang="0.5.21")
    found = finding("sglang")
    assert found.verdict == "fail"
    assert "0.5.21" in found.found
    assert f"sglang=={software.SGLANG_VERSION}" in found.remedy


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking_import(monkeypatch, "torch")
    findings = list(examine(0))
    by_name = {each.name: each for each in findings}
    assert by_name["torch"].verdict == "fail"
    assert "cannot open shared object" in by_name["torch"].found
    assert by_name["sglang"].verdict == "ok"
    assert not healthy(findings)


@pytest.mark.parametrize("version", ["2.10.1", "2.15.0+cpu"])
def test_a_torch_that_sglang_does_not_accept(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", version)
    found = finding("torch")
    assert found.verdict == "fail"
    assert version in found.found


@pytest.mark.parametrize("version", ["2.11.0+cpu", "2.14.1", "2.14.2"])
def test_every_torch_that_sglang_accepts_is_sound(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.__version__", version)
    assert finding("torch").verdict == "ok"


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.29.1")
    found = finding("packages")
    assert found.verdict == "fail"
    assert "torchvision is 0.29.1, not ==0.28.*" in found.found


def test_a_missing_and_a_wrong_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, msgspec=None, transformers="4.0")
    found = finding("packages")
    assert found.verdict == "fail"
    assert "msgspec is missing" in found.found
    assert "transformers is 4.0, not ==" in found.found


def test_a_changed_attachment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [status("s.kept", "1", "1"), status("s.changed", "1", "2"), status("s.gone", "1", None)]
    monkeypatch.setattr(attachments, "check", lambda: rows)
    found = finding("attachments")
    assert found.verdict == "fail"
    assert found.found.startswith("2 of 3 differ")
    assert "s.changed, s.gone (gone)" in found.found


def test_a_model_that_is_not_converted_yet_is_only_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache_folder.ENV, str(tmp_path / "other"))
    found = finding("model")
    assert found.verdict == "note"
    assert "model ensure" in found.remedy
    assert not (tmp_path / "other").exists()


def test_no_model_and_no_package_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_folder.ENV, str(tmp_path / "other"))
    monkeypatch.setattr(model, "PACKAGE", "no-such-package-of-ours")
    found = finding("model")
    assert found.verdict == "fail"
    assert "scripts/install" in found.remedy


@pytest.mark.parametrize(("converted", "verdict"), [(True, "note"), (False, "fail")])
def test_a_cache_that_cannot_be_written(
    converted: bool, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    if not converted:
        monkeypatch.setenv(cache_folder.ENV, str(tmp_path / "other"))
    monkeypatch.setattr(hardware.tempfile, "TemporaryFile", read_only)
    found = finding("cache folder")
    assert (found.verdict, cache_folder.ENV in found.remedy) == (verdict, True)
    assert "Read-only" in found.found


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = finding("port", taken.getsockname()[1])
    assert found.verdict == "fail"
    assert "--port" in found.remedy


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model.model_path() / "config.json"
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9}
    config.write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    monkeypatch.setattr("stateful_sglang.server.machine.probe", lambda: Machine(2, 1 << 28))
    found = finding("memory")
    assert found.verdict == "fail"
    assert "too little memory" in found.found


def test_no_compiler_is_noted_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "find_compiler", lambda: None)
    found = finding("compiler")
    assert found.verdict == "note"
    assert found.remedy == extension.GET_COMPILER


@pytest.mark.parametrize(
    "check", ["cpu_settings.model_shape", "machine.probe", "machine.usable_cores"]
)
def test_a_check_that_breaks_is_a_row(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.model_path() / "config.json").write_text("{}")

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen\nsecond line")

    monkeypatch.setattr(f"stateful_sglang.server.{check}", broken)
    findings = list(examine(0))
    assert len(findings) == len({each.name for each in findings}) == 14
    assert any(each.found == "RuntimeError: unforeseen" for each in findings)


def failing(names: list[str]) -> Callable[..., list[Finding]]:
    return lambda *_: [Finding(name, "fail", "broken", "mend it") for name in names]


def test_the_exit_status_and_the_remedy_follow_the_findings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from stateful_sglang.cli import app

    monkeypatch.setattr(doctor, "examine", failing(["torch", "port"]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "-> mend it" in result.output
    assert "would fail: torch, port" in result.output
    monkeypatch.setattr(doctor, "examine", failing([]))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_a_port_in_use_is_shown_before_torch_is_imported() -> None:
    code = """
import sys
from stateful_sglang.doctor import examine, render
port = int(sys.argv[1])
for row in examine(port):
    if row.name == "port":
        assert row.verdict == "fail"
        sys.exit(f"imported {heavy}" if (heavy := {"torch", "sglang"} & set(sys.modules)) else 0)
"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = subprocess.run([sys.executable, "-c", code, port], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_row_is_shown_before_the_next_check_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def checks() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        assert "first" in capsys.readouterr().out
        yield Finding("second", "fail", "broken", "mend it")

    assert [row.name for row in render(checks())] == ["first", "second"]
