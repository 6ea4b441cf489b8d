"""What the benches' rooms may import: of each other, and of the package that they measure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import bench

ROOT = Path(bench.__file__).parent
BELOW = {
    "corpus": {"corpus"},
    "workloads": {"corpus", "workloads"},
    "harness": {"workloads", "harness"},
    "engines": {"corpus", "workloads", "harness", "engines"},
    "suites": {"corpus", "workloads", "harness", "engines", "suites"},
}
KNOW_THE_PACKAGE = {"package", "biased", "forward", "layers", "parts", "stock", "recorder"}
"""Files of `engines/` that import the package; all others only start its launcher."""


def imports() -> Iterator[tuple[Path, str]]:
    """Every file of the benches, below its room, with each module that it imports."""
    for room in BELOW:
        for file in (ROOT / room).rglob("*.py"):
            if "repository" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((file.relative_to(ROOT), name) for name in names)


def test_no_room_imports_one_above_it() -> None:
    found = [(file, name) for file, name in imports() if name.startswith("bench.")]
    assert len(found) > 50
    wrong = [
        (str(file), name) for file, name in found if name.split(".")[1] not in BELOW[file.parts[0]]
    ]
    assert not wrong


def test_the_package_is_imported_in_few_files_of_one_room() -> None:
    found = {
        file for file, name in imports() if name.split(".")[0] in ("stateful_sglang", "sglang")
    }
    assert found == {Path("engines", f"{name}.py") for name in KNOW_THE_PACKAGE}
