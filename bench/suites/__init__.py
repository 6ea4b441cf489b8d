"""What a person runs: each module here with a function `main` is a bench of the module's name.

A new bench is a new file. Its module's docstring is its help, whose first line describes it in the
list; the options are `main`'s parameters, as typer reads them, and what `main` returns is the exit
status (None counts as 0). Options that several have are declared in `bench/harness/options.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of all benches, in order."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))


def description(name: str) -> str:
    """First line of a bench's docstring, read without importing what the bench needs."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]
