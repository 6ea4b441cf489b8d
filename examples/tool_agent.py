"""An agent's loop. Each turn sends the new messages only: the question, then each tool's result."""

from __future__ import annotations

import sys
from datetime import date
from typing import Any

from stateful_sglang.client import Client

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "days_between",
            "description": "Number of days from one date to another.",
            "parameters": {
                "type": "object",
                "properties": {
                    "start": {"type": "string", "pattern": "^20[0-9]{2}-0[1-9]-[01][1-8]$"},
                    "end": {"type": "string", "pattern": "^20[0-9]{2}-0[1-9]-[01][1-8]$"},
                },
                "required": ["start", "end"],
                "additionalProperties": False,
            },
        },
    }
]
GREEDY = {"temperature": 0, "max_tokens": 96}


def days_between(start: str, end: str) -> str:
    """The tool itself."""
    try:
        return f"{(date.fromisoformat(end) - date.fromisoformat(start)).days} days"
    except ValueError as error:
        return f"error: {error}"


def main(url: str) -> None:
    with Client(url) as client, client.open(tools=TOOLS) as session:
        turn = session.append(
            "How long is it from 2026-03-01 to 2026-04-15?",
            sampling=GREEDY,
            tool_choice="required",
        )
        for call in turn.tool_calls:
            result = days_between(**call.parsed())
            print(f"{call.name}({call.arguments}) -> {result}")
            turn = session.append([call.result(result)], sampling=GREEDY, tool_choice="none")
        print(turn.text.strip())
        print(f"{turn.usage.history_tokens} tokens were there, {turn.usage.computed_tokens} new")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")
