"""What a terminal shows: tables for people, tabs between fields where a program reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; without a terminal its rows alone, tabs between the cells."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(_one_line(cell) for cell in row))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(_escaped, row))
    console.print(table)


def print_list(
    found: Sequence[Mapping[str, Any]], columns: Mapping[str, str], as_json: bool
) -> None:
    """What a server listed: all of it for programs, and for people the fields that columns show."""
    if as_json:
        print_json(found)
    else:
        print_rows(
            list(columns), ([shown(row, name) for name in columns.values()] for row in found)
        )


def shown(fields: Mapping[str, Any], name: str) -> str:
    """A field of a session, for people."""
    value = fields[name]
    if name.endswith("_at"):
        return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M:%S}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def said(messages: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All that was said, in order, what the next turn will render last."""
    system = messages["system"]
    first = [] if system is None else [{"role": "system", "content": system}]
    later = [{**each, "role": f"{each['role']} (pending)"} for each in messages["pending"]]
    return [*first, *messages["messages"], *later]


def print_message(message: Mapping[str, Any]) -> None:
    """What somebody said; without a terminal on one line."""
    console = Console()
    calls = [
        f"-> {call['function']['name']}({call['function']['arguments']})"
        for call in message.get("tool_calls", ())
    ]
    lines = [*filter(None, [message["content"]]), *calls]
    if console.is_terminal:
        console.print(f"[bold]{_escaped(message['role'])}[/bold]")
        for line in lines:
            console.print(_clean(line), markup=False, highlight=False)
    else:
        print(f"{message['role']}\t{_one_line(' '.join(lines))}")


def _clean(text: str) -> str:
    """Text of a model or a tool, without what a terminal would obey."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)


def _one_line(text: str) -> str:
    return " ".join(_clean(text).split())


def _escaped(text: str) -> str:
    return escape(_clean(text))
