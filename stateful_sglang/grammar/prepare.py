"""One step from what a client sent to what the compiler is given, in text on both sides.

Text, so that it crosses the border to another process cheaply: this is the part that takes long.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from stateful_sglang.grammar import bounds
from stateful_sglang.grammar.calls import check_tools, tool_call_schema
from stateful_sglang.grammar.conjunctions import Conjunctions
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.references import Definitions

Kind = Literal["json_schema", "tools", "tool_call", "regex", "ebnf"]
"""What a constraint is given as. ``tools`` is only checked, and has no answer."""


def prepare(kind: str, text: str) -> str:
    """The constraint as the compiler takes it.

    Raises:
        ConstraintError: It can't be used; says why.
    """
    if kind in ("regex", "ebnf"):
        bounds.check_text(text, "regular expression" if kind == "regex" else "grammar")
        return text
    limit = bounds.MAX_SCHEMA_CHARS * (1 if kind == "json_schema" else 4)
    if len(text) > limit:
        raise ConstraintError(f"the schema has more than {limit} characters, the most taken")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"not JSON: {error}") from None
    if kind == "tools":
        check_tools(value)
        return ""
    return json.dumps(tool_call_schema(value) if kind == "tool_call" else grammar_schema(value))


def grammar_schema(schema: Any) -> dict[str, Any]:
    """A schema of any dialect as the compiler takes it, with the same meaning.

    Raises:
        ConstraintError: It is no schema, or says what no grammar can follow.
    """
    definitions = Definitions()
    root = definitions.add(schema)
    if definitions.unsupported:
        raise definitions.unsupported[0]
    document: dict[str, Any] = Conjunctions(definitions.schemas).document(root)
    return document
