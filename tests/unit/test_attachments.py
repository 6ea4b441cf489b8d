"""Fingerprints catch a changed upstream and ignore its formatting."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from stateful_sglang.attachments import check as attachments
from stateful_sglang.attachments.check import FingerprintMismatchError


def test_every_committed_fingerprint_holds_for_the_installed_sglang() -> None:
    broken = [status for status in attachments.check() if not status.holds]
    assert broken == []
    attachments.require_match()


def test_the_committed_table_lists_exactly_what_the_rooms_attach() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "stateful_sglang.server.catalogue"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_a_missing_target_has_no_fingerprint() -> None:
    assert attachments.fingerprint("sglang.srt.managers.scheduler.Scheduler.no_such_method") is None
    assert attachments.fingerprint("no_such_package.module.name") is None


def test_formatting_and_comments_do_not_change_a_fingerprint() -> None:
    digest = attachments._digest
    spaced = "def f(x):\n    # a comment\n    return (x +\n            1)\n"
    plain = "def f(x):\n    return x + 1\n"
    assert digest(ast.parse(spaced)) == digest(ast.parse(plain))
    assert digest(ast.parse(plain)) != digest(ast.parse(plain.replace("1", "2")))


def test_a_changed_upstream_function_is_named_in_the_error(tmp_path, monkeypatch) -> None:
    rows = json.loads(attachments.TABLE.read_text())
    rows[0]["fingerprint"] = "0" * 16
    table = tmp_path / "attachments.json"
    table.write_text(json.dumps(rows))
    monkeypatch.setattr(attachments, "TABLE", table)
    with pytest.raises(FingerprintMismatchError, match=rows[0]["target"]):
        attachments.require_match()


def test_another_sglang_release_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(attachments.metadata, "version", lambda _name: "0.5.21")
    with pytest.raises(FingerprintMismatchError, match=r"0\.5\.21 is installed.*exactly 0\.5\.23"):
        attachments.require_match()
