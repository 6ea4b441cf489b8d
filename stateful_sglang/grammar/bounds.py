"""How large a constraint may be: what a compiler needs minutes for is refused in microseconds."""

from __future__ import annotations

import math
import re
from typing import Any

from stateful_sglang.grammar.errors import ConstraintError

MAX_SCHEMA_CHARS = 1 << 20
"""Of the schema as JSON; of all tools of a session together, four times that."""
MAX_NODES = 100_000
"""Values of any kind in a schema, and in what it is rewritten to."""
MAX_COMBINATIONS = 4_000
"""Schemas made of several that must hold together: alternatives multiply."""
MAX_DEPTH = 64
"""Levels of nesting. The compiler's time grows with their square, its stack with each."""
MAX_TEXT_CHARS = 1 << 16
"""Of a regular expression or an EBNF grammar."""
MAX_PARENTHESES = 200
"""Open at once; the compiler recurses once a level."""
MAX_REPEAT = 10_000
"""Largest number in ``{n,m}``, ``minLength`` and their like: the compiler's state grows with it."""
MAX_NESTED_REPEATS = 100_000
"""Largest product of the numbers of repetitions within each other, as 1,000 in
``((a){1,10}){1,100}``. The compiler goes through every way to count them for every token of the
vocabulary."""

_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_schema_size(schema: Any) -> None:
    """Raise `ConstraintError` where a parsed schema passes a bound; never recurses."""
    nodes = 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise ConstraintError(f"the schema has more than {MAX_NODES} values, the most taken")
        if depth > MAX_DEPTH:
            raise ConstraintError(f"the schema is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            stack.extend((each, depth + 1) for each in value.values())
        elif isinstance(value, list):
            stack.extend((each, depth + 1) for each in value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConstraintError("a number in the schema is not finite")


def check_text(text: str, what: str) -> None:
    """Raise `ConstraintError` where a regular expression or grammar (`what`) passes a bound."""
    if len(text) > MAX_TEXT_CHARS:
        raise ConstraintError(f"the {what} has more than {MAX_TEXT_CHARS} characters")
    if "\x00" in text:
        raise ConstraintError(f"the {what} contains a NUL character")
    depth = deepest = 0
    for char in text:
        if char == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif char == ")":
            depth = max(0, depth - 1)
    if deepest > MAX_PARENTHESES:
        raise ConstraintError(f"the {what} nests parentheses deeper than {MAX_PARENTHESES}")
    for match in _REPEAT.finditer(text):
        if any(len(number) > 9 or int(number or 0) > MAX_REPEAT for number in match.groups("")):
            raise ConstraintError(f"the {what} repeats something more than {MAX_REPEAT} times")
    if _nested_repeats(text) > MAX_NESTED_REPEATS:
        raise ConstraintError(
            f"the {what} has repetitions within each other whose numbers multiply to more than "
            f"{MAX_NESTED_REPEATS}"
        )


def _nested_repeats(text: str) -> int:
    """Largest product of the numbers of counted repetitions that lie within each other."""
    # For each open group, the largest product inside it so far; the last one closed comes up again
    # where a repetition follows it.
    inside = [1]
    closed = 1
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
            closed = 1
        elif char == "(":
            inside.append(1)
        elif char == ")" and len(inside) > 1:
            closed = inside.pop()
            inside[-1] = max(inside[-1], closed)
        elif char == "{" and (match := _REPEAT.match(text, at)):
            low, high = match.groups("")
            closed *= max(1, int(high or low or 1))
            inside[-1] = max(inside[-1], closed)
            at = match.end() - 1
        else:
            closed = 1
        at += 1
    return max(inside)
