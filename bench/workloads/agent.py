"""A coding agent: its instructions, four tools, and two lists of tasks in the corpus's repository.

The model writes every call itself, under a JSON schema; what a call brings back (`tools.py`), error
or not, goes back to it as the tool's result.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.workloads.tools import text_files

SHOWN_FILES = 24
MAX_TURNS = 16
"""Beyond them a conversation would not fit into the default model's context."""
PACKAGE = "stateful_sglang"


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
        (str(f.relative_to(root)) for f in text_files(root / PACKAGE)), SHOWN_FILES
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
    file = {"A": "stateful_sglang/session/render.py", "B": "LICENSE"}[agent]
    while len(asked) < turns:
        first = 1 + 12 * (len(asked) - len(TASKS[agent]))
        asked.append(f'Read lines {first} to {first + 11} of "{file}".')
    return asked


def _call(name: str, values: tuple[Any, ...]) -> Mapping[str, Any]:
    (tool,) = [tool["function"] for tool in TOOLS if tool["function"]["name"] == name]
    keys = tool["parameters"]["properties"]
    return {"name": name, "arguments": dict(zip(keys, values, strict=True))}
