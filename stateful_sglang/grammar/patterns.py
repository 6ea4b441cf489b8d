"""Regular expressions of a schema, as a grammar reads them.

JSON Schema searches a pattern anywhere in the string; the compiler takes it for the whole string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ANY = r'[^"\\\x00-\x1f]*'
"""Any characters that stand in a JSON string as they are."""
_ONE_CLASS = re.compile(r"^\^(\[(?:\\.|[^\]\\])+\]|\\[dws]|\.)(\+|\*|\{(\d+)(,(\d*))?\})\$$", re.S)


def anchored(pattern: str) -> str:
    """The pattern of whole strings that contain a match: ``b`` becomes ``^any b any$``."""
    wholes = [_whole(part) for part in _alternatives(pattern)]
    return wholes[0] if len(wholes) == 1 else f"^({'|'.join(each[1:-1] for each in wholes)})$"


def with_length(pattern: str, shortest: int, longest: int | None) -> str | None:
    """An anchored pattern and bounds of its length as one, or None where there's no simple way.

    The way is simple where one character class is repeated, which is what most schemas do.
    """
    match = _ONE_CLASS.match(pattern)
    if match is None:
        return None
    repeat, low, comma, high = match[2], match[3], match[4], match[5]
    least = {"+": 1, "*": 0}.get(repeat, int(low or 0))
    most = None if repeat in "+*" else int(high) if high else None if comma else int(low)
    least = max(least, shortest)
    bounds = [bound for bound in (most, longest) if bound is not None]
    if bounds and min(bounds) < least:
        return None
    return f"^{match[1]}{{{least},{min(bounds) if bounds else ''}}}$"


def _whole(part: str) -> str:
    starts = part.startswith("^")
    ends = part.endswith("$") and not _escaped(part, len(part) - 1)
    body = part[int(starts) : len(part) - int(ends)]
    return f"^{'' if starts else _ANY}{body}{'' if ends else _ANY}$"


def _escaped(text: str, at: int) -> bool:
    slashes = len(text[:at]) - len(text[:at].rstrip("\\"))
    return slashes % 2 == 1


def _alternatives(pattern: str) -> list[str]:
    """The pattern split at the ``|`` that stand in no group and no class."""
    parts, depth, begin = [], 0, 0
    for at, char in _outside_classes(pattern):
        if char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
        elif char == "|" and depth == 0:
            parts.append(pattern[begin:at])
            begin = at + 1
    return [*parts, pattern[begin:]]


def _outside_classes(pattern: str) -> Iterator[tuple[int, str]]:
    at, in_class = 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        else:
            yield at, char
        at += 1
