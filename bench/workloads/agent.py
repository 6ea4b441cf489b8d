"""A coding agent for the demo: four tools that really run on a repository, and two lists of tasks.

The model writes every call itself, under a JSON schema; what a call brings back, error or not, goes
back to it as the tool's result.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULT_LINES = 24
RESULT_CHARACTERS = 1000
"""A result is cut to this, some 300 tokens: what recorded agents add in a turn."""
LISTED_FILES = 24
SHOWN_FILES = 24
MAX_TURNS = 16
"""Beyond them a conversation would not fit into the default model's context."""
PACKAGE = "stateful_sglang"
SKIPPED = {"__pycache__", "build", "dist"}


class ToolError(Exception):
    """A call that cannot be carried out; the message goes to the model."""


class Outcome(NamedTuple):
    """What a call came to."""

    text: str
    failed: bool


def _tool(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    properties = {
        key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


TOOLS = (
    _tool(
        "search",
        "Find the lines that contain a text in the files below a folder.",
        text=("string", "The text to look for, as it stands in the file."),
        path=("string", "Folder to search, relative to the repository."),
    ),
    _tool(
        "read",
        "Read some lines of a file.",
        path=("string", "File to read, relative to the repository."),
        first_line=("integer", "First line to read, counted from 1."),
        last_line=("integer", "Last line to read."),
    ),
    _tool(
        "list",
        "List the files and folders in a folder.",
        path=("string", "Folder to list, relative to the repository."),
    ),
    _tool(
        "count_lines",
        "Count the lines of a file.",
        path=("string", "File to count, relative to the repository."),
    ),
)

_EXAMPLES = (
    ('Read lines 1 to 30 of "docs/design.md".', "read", ("docs/design.md", 1, 30)),
    ('Search for "requires-python" in "docs".', "search", ("requires-python", "docs")),
    ('List the files in "tests/unit".', "list", ("tests/unit",)),
    ('Count the lines of "pyproject.toml".', "count_lines", ("pyproject.toml",)),
    (
        'Read lines 10 to 24 of "stateful_sglang/api/errors.py".',
        "read",
        ("stateful_sglang/api/errors.py", 10, 24),
    ),
    (
        'Search for "import json" in "stateful_sglang/runtime".',
        "search",
        ("import json", "stateful_sglang/runtime"),
    ),
    ('List the files in "stateful_sglang/api".', "list", ("stateful_sglang/api",)),
    (
        'Count the lines of "stateful_sglang/launch.py".',
        "count_lines",
        ("stateful_sglang/launch.py",),
    ),
)

TASKS: dict[str, tuple[str, ...]] = {
    "A": (
        'Search for "class Transcript" in "stateful_sglang/session".',
        'Read lines 1 to 24 of "stateful_sglang/session/transcript.py".',
        'List the files in "stateful_sglang/session".',
        'Count the lines of "stateful_sglang/session/store.py".',
        'Read lines 30 to 54 of "stateful_sglang/session/store.py".',
        'Search for "Transcript" in "stateful_sglang/session".',
    ),
    "B": (
        'List the files in "stateful_sglang/draft".',
        'Read lines 1 to 24 of "stateful_sglang/draft/index.py".',
        'Count the lines of "stateful_sglang/draft/index.py".',
        'Search for "def " in "stateful_sglang/draft".',
        'Read lines 30 to 54 of "stateful_sglang/draft/select.py".',
        'List the files in "stateful_sglang/prefix".',
    ),
}


def system_prompt(root: Path) -> str:
    """Instructions and the repository's files; the tools are defined beside it."""
    files = itertools.islice(
        (str(f.relative_to(root)) for f in _files(root / PACKAGE)), SHOWN_FILES
    )
    return (
        "You are a careful coding agent who works in one repository. You answer every request with "
        "exactly one call of one function, written as a JSON object with its name and its "
        "arguments, and nothing else. You copy paths, texts and line numbers exactly as the "
        "request or an earlier result gives them. You never guess at what a file holds: you read "
        "it. When a call fails, you take the error as it is and go on with the next request.\n\n"
        "Some files of the repository:\n" + "\n".join(files)
    )


def examples() -> list[tuple[str, str]]:
    """Requests and their calls, with which every conversation begins."""
    return [(request, json.dumps(_call(name, values))) for request, name, values in _EXAMPLES]


def tasks(agent: str, turns: int) -> list[str]:
    """The first `turns` requests of an agent; past its list, it reads on in larger files."""
    asked = list(TASKS[agent][:turns])
    file = {"A": "docs/design.md", "B": "LICENSE"}[agent]
    while len(asked) < turns:
        first = 1 + 12 * (len(asked) - len(TASKS[agent]))
        asked.append(f'Read lines {first} to {first + 11} of "{file}".')
    return asked


def run_tool(root: Path, call: str) -> Outcome:
    """Carry out a call as the model wrote it, inside `root` only."""
    try:
        request = json.loads(call)
        name, arguments = request["name"], request["arguments"]
        tool = {"search": _search, "read": _read, "list": _list, "count_lines": _count}[name]
        return Outcome(_cut(tool(root, **arguments)), failed=False)
    except ToolError as error:
        return Outcome(f"error: {error}", failed=True)
    except (ValueError, KeyError, TypeError) as error:
        return Outcome(f"error: not a call of a known function: {error}", failed=True)


def _call(name: str, values: tuple[Any, ...]) -> Mapping[str, Any]:
    (tool,) = [tool["function"] for tool in TOOLS if tool["function"]["name"] == name]
    keys = tool["parameters"]["properties"]
    return {"name": name, "arguments": dict(zip(keys, values, strict=True))}


def _files(folder: Path) -> Iterator[Path]:
    """Text files below `folder`, in order, without what is hidden or generated."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in SKIPPED or path.is_symlink():
            continue
        if path.is_dir():
            if path.suffix != ".egg-info":
                yield from _files(path)
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
    for file in [place] if place.is_file() else _files(place):
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
