"""What a client says again with every request, in the one form in which it is compared.

Clients send the whole history each time, and not quite as they got it: arguments of calls are
serialised anew, content comes as a string or in parts, reasoning is left out, ids of calls are
whatever a library made of them. `canonical` leaves of a message what it says, and `digests` chains
hashes of it, so that each prefix of a conversation has one, in one pass. Equal digests prove
nothing: whoever finds a conversation by one compares what was said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from stateful_sglang.session.messages import Message

DIGEST_BYTES = 16


class Said(NamedTuple):
    """One message, as far as it says something."""

    role: str
    content: str
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments of each, the latter as JSON of one form."""
    answers: int | str | None = None
    """Of a tool's result: which of the calls before it, counted from the last message that made
    any; the id as it came where there is no such call."""
    name: str | None = None
    """Of a tool's result alone: some templates write it out."""


class Difference(NamedTuple):
    """Where two conversations part."""

    message: int
    """Counted from 0, the system message being one."""
    field: str
    """Of `Said`; ``role`` too where one conversation ends."""
    offset: int
    """Characters of the field that are equal."""


class Recital(NamedTuple):
    """All that a client says again, with what its beginnings are found by."""

    said: list[Said]
    chain: list[bytes]
    """A digest for each beginning: of nothing said first, of everything last."""

    @property
    def ends(self) -> list[int]:
        """Lengths of the beginnings that a session may have come to, the longest first: those that
        end with an answer."""
        counts = range(len(self.said) - 1, 0, -1)
        return [count for count in counts if self.said[count - 1].role == "assistant"]

    def answered(self, answer: Message) -> bytes:
        """The digest of everything with an answer behind it."""
        return one_more(self.chain[-1], canonical([answer])[0])


def recital(scope: str, messages: Iterable[Message]) -> Recital:
    """What a client says again; `scope` is that of `digests`."""
    said = canonical(messages)
    return Recital(said, digests(scope, said))


def canonical(messages: Iterable[Message]) -> list[Said]:
    """The messages as they are compared, in time proportional to what they say."""
    said: list[Said] = []
    ids: dict[str, int] = {}
    for message in messages:
        if message.role == "assistant":
            ids = {call.id: at for at, call in enumerate(message.tool_calls)}
            calls = tuple((call.name, _arguments(call.arguments)) for call in message.tool_calls)
            # Clients and parsers differ in the white space around an answer.
            said.append(Said("assistant", message.content.strip(), calls))
        elif message.role == "tool":
            call = message.tool_call_id
            place = None if call is None else ids.get(call, call)
            said.append(Said("tool", message.content, (), place, message.name))
        else:
            said.append(Said(message.role, message.content))
    return said


def digests(scope: str, said: Sequence[Said]) -> list[bytes]:
    """A digest for each prefix: of nothing said first, of everything last.

    Args:
        scope: All else that two conversations must have in common: whose it is, the model, tools,
            what the template is told.
        said: What `canonical` made.
    """
    chained = [_hash(b"", scope)]
    for each in said:
        chained.append(_hash(chained[-1], json.dumps(each, ensure_ascii=False)))
    return chained


def one_more(digest: bytes, message: Said) -> bytes:
    """The digest of a conversation with one more message behind it."""
    return _hash(digest, json.dumps(message, ensure_ascii=False))


def first_difference(one: Sequence[Said], other: Sequence[Said]) -> Difference | None:
    """Where two conversations part; None where one begins with the other."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left == right:
            continue
        for field, ours, theirs in zip(Said._fields, left, right, strict=True):
            if ours != theirs:
                return Difference(at, field, _equal_length(ours, theirs))
    return None


def _equal_length(one: Any, other: Any) -> int:
    left, right = (each if isinstance(each, str) else json.dumps(each) for each in (one, other))
    shorter = min(len(left), len(right))
    return next((at for at in range(shorter) if left[at] != right[at]), shorter)


def _arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return _dumped(parsed)
    return _dumped(arguments)


def _dumped(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _hash(before: bytes, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(before + data, digest_size=DIGEST_BYTES).digest()
