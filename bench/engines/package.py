"""What the benches take of the package itself, in one place; the rest only starts its launcher.

The servers of benches are processes (`ours.py`). Beside this file only `biased.py`, `stock.py`,
`forward.py` and `layers.py`, which are about the engine's inside, and `recorder.py`, which is about
the journal, import the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def default_model() -> Path:
    """Checkpoint of the embedded model, converted if it was not yet."""
    from stateful_sglang.embedded.cache import ensure_default_model

    return ensure_default_model()


def default_gguf() -> Path:
    """The embedded model's Q4_1 file."""
    from stateful_sglang.embedded.cache import find_gguf

    return find_gguf()


def usable_cores() -> int:
    """Physical cores within this process's limits."""
    from stateful_sglang.server.machine import usable_cores

    return usable_cores()


def prepare() -> None:
    """Make this process one that transformers and torch can be imported in on this machine."""
    from stateful_sglang.cpu.platform import prepare

    prepare()


def tool_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as the server states them in a system prompt."""
    from stateful_sglang.session.messages import tool_prompt

    return tool_prompt(tools)


def tool_call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of one call of one of the tools, as the server constrains it."""
    from stateful_sglang.grammar.calls import tool_call_schema

    return tool_call_schema(tools)


def plain_form(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Messages as the server writes them for a template that knows no tools."""
    from stateful_sglang.session.messages import Message, plain_form

    return plain_form([Message(message["role"], message["content"]) for message in messages])
