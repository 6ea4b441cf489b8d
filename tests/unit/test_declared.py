"""What is imported is declared, and every Python file is linted."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = ROOT / "stateful_sglang" / "requirements"
OURS = {
    path.stem
    for folder in ("scripts", "tests", "tests/unit", "tests/integration")
    for path in (ROOT / folder).glob("*.py")
} | {"stateful_sglang", "bench", "tests"}
STOOD_IN_FOR = {"triton", "sgl_kernel"}
"""Imported where a real one may be missing and a stand-in of ours answers."""


def imports(path: Path) -> set[str]:
    """Top-level names of other packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - OURS - STOOD_IN_FOR


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Distributions of pyproject.toml, its extras, and the lists that scripts/install installs."""
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    for file in REQUIREMENTS.glob("*.txt"):
        listed = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
        # A build of torch stands on one line with what goes with it.
        lines += [each for line in listed for each in line.split(" ")]
    return {normalised(Requirement(line).name) for line in lines} | {"sglang"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("stateful_sglang", ()),
        ("bench", ("bench", "test")),
        ("tests", ("test",)),
        ("scripts", ()),
    ],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    providers = metadata.packages_distributions()
    known = declared(*extras)
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if not {normalised(each) for each in providers.get(name, [name])} & known
    }
    assert not missing


def test_what_the_client_needs_comes_with_the_package_alone() -> None:
    names = {normalised(Requirement(each).name) for each in PROJECT["project"]["dependencies"]}
    needed = set().union(
        *(imports(path) for path in (ROOT / "stateful_sglang" / "client").rglob("*.py"))
    )
    assert {normalised(name) for name in needed} <= names


def test_python_files_without_a_suffix_are_linted_too() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    unlinted = {
        name
        for name in tracked
        if Path(name).suffix == ""
        and (ROOT / name).is_file()
        and re.match(rb"#!.*\bpython", (ROOT / name).read_bytes()[:80])
    } - set(PROJECT["tool"]["ruff"]["extend-include"])
    assert not unlinted
