"""Another release of SGLang is compared row by row, from a wheel or a folder, uninstalled."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stateful_sglang.attachments import against, sources
from stateful_sglang.attachments import check as attachments
from stateful_sglang.attachments.sources import ReleaseError, open_release
from stateful_sglang.cli import app

HERE = {
    "sglang/_version.py": "__version__ = version = '1.0'\n",
    "sglang/srt/tree.py": """\
class Tree:
    def insert(self, key):
        # A comment.
        return self.walk(key)

    def evict(self, tokens):
        return tokens
""",
    "sglang/srt/pools/__init__.py": "PAGE: int = 16\n",
}
TARGETS = ("sglang.srt.tree.Tree.insert", "sglang.srt.tree.Tree.evict", "sglang.srt.pools.PAGE")


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def pack(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def changed(**texts: str) -> dict[str, str]:
    """The release here, but for some files and as version 1.1."""
    renamed = {f"sglang/srt/{name}.py": text for name, text in texts.items()}
    return HERE | renamed | {"sglang/_version.py": "__version__ = version = '1.1'\n"}


@pytest.fixture(autouse=True)
def _bound_to_the_release_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = open_release(lay_out(tmp_path / "here", HERE))
    rows = [
        {
            "target": target,
            "kind": "relies",
            "reason": "it is called",
            "fingerprint": attachments.fingerprint(target, release),
        }
        for target in TARGETS
    ]
    table = tmp_path / "attachments.json"
    table.write_text(json.dumps(rows))
    monkeypatch.setattr(attachments, "TABLE", table)
    monkeypatch.setattr(sources, "installed", lambda: release)


def verdicts(path: Path) -> dict[str, str]:
    found = against.compare(open_release(path))
    return {row.attachment.target.rpartition(".")[2]: row.verdict for row in found}


Packer = Callable[[Path, dict[str, str]], Path]
FORMS: dict[str, Packer] = {
    "wheel": lambda folder, files: pack(folder / "sglang-1.1-py3-none-any.whl", files),
    "folder": lambda folder, files: lay_out(folder / "there", files),
    "package": lambda folder, files: lay_out(folder / "there", files) / "sglang",
    "checkout": lambda folder, files: lay_out(folder / "there" / "python", files).parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_attachment_holds_changed_or_is_gone(form: str, tmp_path: Path) -> None:
    tree = HERE["sglang/srt/tree.py"].replace("return self.walk(key)", "return self.step(key)")
    tree = tree.replace("def evict", "def release")
    path = FORMS[form](tmp_path, changed(tree=tree))
    assert verdicts(path) == {"insert": "changed", "evict": "gone", "PAGE": "holds"}
    assert open_release(path).name == "SGLang 1.1"


def test_comments_and_formatting_change_nothing(tmp_path: Path) -> None:
    tree = HERE["sglang/srt/tree.py"].replace("# A comment.", "# Another.\n")
    assert set(verdicts(pack(tmp_path / "w.whl", changed(tree=tree))).values()) == {"holds"}


def test_what_became_an_import_is_gone(tmp_path: Path) -> None:
    path = pack(tmp_path / "w.whl", changed(tree="from sglang.srt.other import Tree\n"))
    assert verdicts(path) == {"insert": "gone", "evict": "gone", "PAGE": "holds"}


def test_a_change_is_shown_as_a_diff_of_its_own_lines(tmp_path: Path) -> None:
    tree = HERE["sglang/srt/tree.py"].replace("self.walk(key)", "self.step(key)")
    found = against.compare(open_release(pack(tmp_path / "w.whl", changed(tree=tree))))
    (row,) = [row for row in found if row.verdict == "changed"]
    lines = [line for line in row.diff.splitlines() if line[:1] in "+-"][2:]
    assert lines == ["-    return self.walk(key)", "+    return self.step(key)"]


def test_without_the_release_that_we_are_bound_to_there_is_no_diff_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pack(tmp_path / "w.whl", changed(tree="class Tree:\n    def insert(self): ...\n"))
    monkeypatch.setattr(sources, "installed", lambda: open_release(other))
    found = against.compare(open_release(other))
    assert not any(row.diff for row in found)
    assert "no diffs" in against.report(found, "SGLang 1.1")


def test_the_command_counts_and_its_status_tells_whether_all_hold(tmp_path: Path) -> None:
    same = pack(tmp_path / "same.whl", HERE)
    result = CliRunner().invoke(app, ["doctor", "--against", str(same)])
    assert result.exit_code == 0
    assert result.output.strip() == "SGLang 1.0: 3 attachments: 3 holds, 0 changed, 0 gone"
    other = pack(tmp_path / "other.whl", changed(tree="class Tree:\n    def insert(self): ...\n"))
    result = CliRunner().invoke(app, ["doctor", "--against", str(other)])
    assert result.exit_code == 1
    assert "gone: sglang.srt.tree.Tree.evict" in result.output
    assert "+def insert(self):" in result.output
    assert result.output.strip().endswith("1 holds, 1 changed, 1 gone")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: lay_out(folder / "empty", {"a.py": ""}), "holds no sglang/srt"),
        (lambda folder: pack(folder / "w.whl", {"other/a.py": ""}), "holds no sglang/srt"),
        (lambda folder: lay_out(folder, {"text.whl": "no zip"}) / "text.whl", "cannot be opened"),
    ],
)
def test_a_path_without_sglang_is_refused_with_what_was_expected(
    made: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    path = made(tmp_path)
    with pytest.raises(ReleaseError, match=f"{said}.*expected a wheel"):
        open_release(path)
    result = CliRunner().invoke(app, ["doctor", "--against", str(path)])
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_source_that_is_no_python_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "w.whl", changed(tree="class Tree(:\n"))
    result = CliRunner().invoke(app, ["doctor", "--against", str(path)])
    assert result.exit_code == 1
    assert "sglang/srt/tree.py cannot be read as Python" in result.output
