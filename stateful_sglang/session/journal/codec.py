"""Messages, heads and tokens as a journal's columns hold them, and back, exactly.

JSON is UTF-8 with surrogates passed through, since a message may have a lone one. Blobs are
compressed where that makes them shorter: tokens of prose take 1.5 to 2.5 of their 4 bytes, at some
0.1 microseconds each.
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from stateful_sglang.session.messages import Head, Message, ToolCall

_PLAIN, _DEFLATED = b"\0", b"\1"
_WORTH = 128
"""Bytes below which compressing is not tried."""

Column = str | bytes
"""A name in a column: bytes where it has what UTF-8 does not, so that equal names stay equal."""


class DamagedError(ValueError):
    """A column holds what no release writes."""


def name(text: str) -> Column:
    """A name as a column."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def from_name(column: Column) -> str:
    """The name in a column."""
    return column if isinstance(column, str) else column.decode("utf-8", "surrogatepass")


def pack(data: bytes) -> bytes:
    """Bytes as a blob."""
    if len(data) >= _WORTH:
        short = zlib.compress(data, 1)
        if len(short) < len(data):
            return _DEFLATED + short
    return _PLAIN + data


def unpack(blob: bytes) -> bytes:
    """The bytes in a blob.

    Raises:
        DamagedError: It is none.
    """
    kind, data = blob[:1], blob[1:]
    if kind == _PLAIN:
        return data
    if kind != _DEFLATED:
        raise DamagedError("a blob begins with neither 0 nor 1")
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise DamagedError(f"a blob cannot be decompressed: {error}") from error


def dump(value: Any) -> bytes:
    """What JSON knows, as a blob."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return pack(text.encode("utf-8", "surrogatepass"))


def parse(blob: bytes) -> Any:
    """What `dump` was given.

    Raises:
        DamagedError: It is not JSON.
    """
    try:
        return json.loads(unpack(blob).decode("utf-8", "surrogatepass"))
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"a blob is no JSON: {error}") from error


def dump_tokens(tokens: array[int]) -> bytes:
    """Tokens, typecode ``'i'``, as a blob of little-endian numbers of four bytes."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return pack(tokens.tobytes())


def parse_tokens(blob: bytes) -> array[int]:
    """What `dump_tokens` was given.

    Raises:
        DamagedError: They are not whole tokens.
    """
    tokens = array("i")
    try:
        tokens.frombytes(unpack(blob))
    except ValueError as error:
        raise DamagedError(f"a blob holds no whole tokens: {error}") from error
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def dump_messages(messages: Iterable[Message]) -> bytes:
    """Messages as a blob: fields at their defaults are left out, and text equal to `raw` too."""
    return dump([message_form(message) for message in messages])


def message_form(message: Message) -> dict[str, Any]:
    """A message as JSON has it."""
    form: dict[str, Any] = {"role": message.role}
    if message.raw is None or message.raw != message.content:
        form["content"] = message.content
    if message.tool_calls:
        form["tool_calls"] = [[call.id, call.name, call.arguments] for call in message.tool_calls]
    for field in ("tool_call_id", "name", "raw"):
        if (value := getattr(message, field)) is not None:
            form[field] = value
    if message.tokens:
        form["tokens"] = sorted(message.tokens)
    return form


def parse_messages(blob: bytes) -> tuple[Message, ...]:
    """What `dump_messages` was given; `content` and `raw` are one object where they are equal.

    Raises:
        DamagedError: They are no messages.
    """
    try:
        return tuple(message_of(form) for form in parse(blob))
    except (TypeError, LookupError, AttributeError) as error:
        raise DamagedError(f"a blob holds no messages: {error}") from error


def message_of(form: Mapping[str, Any]) -> Message:
    """What `message_form` was given; `content` and `raw` are one object where they are equal."""
    raw = form.get("raw")
    return Message(
        role=form["role"],
        content=form["content"] if "content" in form else form["raw"],
        tool_calls=tuple(ToolCall(*call) for call in form.get("tool_calls", ())),
        tool_call_id=form.get("tool_call_id"),
        name=form.get("name"),
        raw=raw,
        tokens=frozenset(form.get("tokens", ())),
    )


def dump_head(head: Head) -> bytes:
    """A head as a blob."""
    values = [head.system, list(head.tools), dict(head.template_kwargs)]
    return dump([*values, True] if head.verbatim else values)


def parse_head(blob: bytes) -> Head:
    """What `dump_head` was given.

    Raises:
        DamagedError: It is no head.
    """
    try:
        system, tools, kwargs, *verbatim = parse(blob)
        return Head(system, tuple(tools), kwargs, verbatim == [True])
    except (TypeError, ValueError) as error:
        raise DamagedError(f"a blob holds no head: {error}") from error
