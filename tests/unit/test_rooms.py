"""The table of rooms in docs/design.md, held: who may import whom, no circle, SGLang's places.

Imports are read from the source, those inside functions and under ``TYPE_CHECKING`` included: an
import that happens late is still one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "stateful_sglang"
ROOT = Path(__file__).parents[2]

ROOMS = (
    "registry",
    "loopback",
    "cache_folder",
    "attachments",
    "session",
    "grammar",
    "rendering",
    "prefix",
    "draft",
    "tenants",
    "service",
    "api",
    "client",
    "cpu",
    "torch_backend",
    "embedded",
    "runtime",
    "server",
    "doctor",
    "launch",
    "cli",
)
"""From the ground floor up: each may import those before it."""

HEAVY = frozenset({"sglang", "torch"})
MAY_IMPORT_HEAVY = {
    "cpu": "the CPU engine is written for both",
    "torch_backend.py": "what torch calls at the end of its import",
    "runtime": "the binding",
    "server": "SGLang's arguments and its HTTP server",
    "doctor": "looks at torch's devices",
    "client/sgl.py": "a backend of the sgl frontend language",
    "api/openai": "serving classes of SGLang",
    "api/anthropic": "serving classes of SGLang",
    "embedded/conversion.py": "a process of its own that converts the model's weights",
}
"""Rooms, folders or files, and why. Everything else is pure."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports: modules of ours where the name is one, else the name as written."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in modules() else base)
    return frozenset(names)


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def ours(module: str) -> Iterator[str]:
    return (name for name in imports(module) if name == PACKAGE or name.startswith(f"{PACKAGE}."))


def test_every_module_lies_in_a_room_of_the_table() -> None:
    assert {room_of(module) for module in modules()} - {None} <= set(ROOMS)


def test_a_room_imports_only_rooms_below_it() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if (room := room_of(module)) is not None
        for name in ours(module)
        if (other := room_of(name)) is not None and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert wrong == []


def test_no_imports_run_in_a_circle() -> None:
    graph = {module: set(ours(module)) - {module} for module in modules()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_binding_names_sglang_and_torch() -> None:
    wrong = []
    for module, path in modules().items():
        place = path.relative_to(ROOT / PACKAGE).as_posix()
        if any(place == each or place.startswith(f"{each}/") for each in MAY_IMPORT_HEAVY):
            continue
        wrong += [f"{place}: {name}" for name in imports(module) if name.split(".")[0] in HEAVY]
    assert wrong == []


@pytest.mark.parametrize(
    "room",
    ["attachments", "session", "grammar", "rendering", "prefix", "draft", "tenants", "service"],
)
def test_importing_a_pure_room_loads_nothing_heavy(room: str) -> None:
    """What the table says by source holds at run time too: no library pulls them in."""
    names = [name for name in modules() if room_of(name) == room]
    code = (
        f"import sys, {', '.join(names)}; "
        "heavy = {'sglang', 'torch', 'transformers', 'fastapi', 'pydantic'} & set(sys.modules); "
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_the_design_lists_the_rooms_in_this_order() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("## The rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE)
    listed = [name.removesuffix(".py").rstrip("/") for row in rows for name in row.split("`")[1::2]]
    assert [name for name in listed if "/" not in name and name in ROOMS] == list(ROOMS)
