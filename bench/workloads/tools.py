"""The agent's tools, which really search and read a repository, and nothing outside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

RESULT_LINES = 24
RESULT_CHARACTERS = 1000
"""A result is cut to this, some 300 tokens: what recorded agents add in a turn."""
LISTED_FILES = 24
SKIPPED = {"__pycache__", "build", "dist"}


class ToolError(Exception):
    """A call that cannot be carried out; the message goes to the model."""


class Outcome(NamedTuple):
    """What a call came to."""

    text: str
    failed: bool


def run_tool(root: Path, call: str) -> Outcome:
    """Carry out a call as the model wrote it, inside `root` only."""
    try:
        request = json.loads(call)
        name, arguments = request["name"], request["arguments"]
        return Outcome(_cut(_TOOLS[name](root, **arguments)), failed=False)
    except ToolError as error:
        return Outcome(f"error: {error}", failed=True)
    except (ValueError, KeyError, TypeError) as error:
        return Outcome(f"error: not a call of a known function: {error}", failed=True)


def text_files(folder: Path) -> Iterator[Path]:
    """Text files below `folder`, in order, without what is hidden or generated."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in SKIPPED or path.is_symlink():
            continue
        if path.is_dir():
            if path.suffix != ".egg-info":
                yield from text_files(path)
        elif path.suffix in {".py", ".md", ".toml", ".txt", ".cpp", ".h", ".json", ""}:
            yield path


def _inside(root: Path, path: str) -> Path:
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise ToolError(f"{path} is outside the repository")
    if not found.exists():
        raise ToolError(f"{path} does not exist")
    return found


def _lines(root: Path, path: str) -> list[str]:
    file = _inside(root, path)
    if not file.is_file():
        raise ToolError(f"{path} is not a file")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ToolError(f"{path} is not text") from error


def _search(root: Path, text: str, path: str) -> str:
    if not text:
        raise ToolError("there is no text to look for")
    place = _inside(root, path)
    hits = []
    for file in [place] if place.is_file() else text_files(place):
        name = file.relative_to(root.resolve())
        try:
            lines = _lines(root, str(name))
        except ToolError:
            continue
        hits += [f"{name}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if text in line]
    return "\n".join(hits) or f"no line contains {text}"


def _read(root: Path, path: str, first_line: int, last_line: int) -> str:
    lines = _lines(root, path)
    if not 1 <= first_line <= min(last_line, len(lines)):
        raise ToolError(f"{path} has lines 1 to {len(lines)}, not {first_line} to {last_line}")
    numbered = enumerate(lines[first_line - 1 : last_line], first_line)
    return "\n".join(f"{number} {line}" for number, line in numbered)


def _list(root: Path, path: str) -> str:
    folder = _inside(root, path)
    if not folder.is_dir():
        raise ToolError(f"{path} is not a folder")
    entries = [
        f"{entry.name}/" if entry.is_dir() else f"{entry.name} ({entry.stat().st_size} bytes)"
        for entry in sorted(folder.iterdir())
        if entry.name not in SKIPPED and not entry.name.startswith(".")
    ]
    return "\n".join(entries[:LISTED_FILES]) or f"{path} is empty"


def _count(root: Path, path: str) -> str:
    return f"{path} has {len(_lines(root, path))} lines"


def _cut(text: str) -> str:
    lines = text.splitlines()
    kept = "\n".join(lines[:RESULT_LINES])[:RESULT_CHARACTERS]
    return kept if kept == text else f"{kept}\n... ({len(lines)} lines in all)"


_TOOLS: dict[str, Callable[..., str]] = {
    "search": _search,
    "read": _read,
    "list": _list,
    "count_lines": _count,
}
