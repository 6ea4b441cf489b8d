"""Results of tools as they come in: paired with their calls, and put in the order of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stateful_sglang.session.conversation import Conversation
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import Message


class Pairing(NamedTuple):
    """Pending messages, sorted by what can be computed now."""

    ready: list[Message]
    """Those before which nothing is missing, in order."""
    waiting: list[Message]
    """Results of later calls, in order of the calls; then what follows them."""
    missing: tuple[str, ...]
    """Ids of the calls without a result, in order."""


def _open_calls(conversation: Conversation, pending: Sequence[Message]) -> tuple[str, ...]:
    """Ids of the calls that pending results may answer: those of the last assistant message."""
    for message in reversed(pending):
        if message.role == "assistant":
            return tuple(call.id for call in message.tool_calls)
    answered: list[str | None] = []
    messages = conversation.messages
    for at in range(len(messages) - 1, -1, -1):
        message = messages[at]
        if message.role == "assistant":
            return tuple(call.id for call in message.tool_calls if call.id not in answered)
        if message.role != "tool":
            return ()
        answered.append(message.tool_call_id)
    return ()


def pair(conversation: Conversation, pending: Sequence[Message]) -> Pairing:
    """Pending messages in the order of the last answer's calls.

    Only results that name a call are moved, and only past each other: they take the places that
    results have among the pending messages.
    """
    calls = _open_calls(conversation, pending)
    place = {call: at for at, call in enumerate(calls)}
    last_answer = max(
        (at for at, message in enumerate(pending) if message.role == "assistant"), default=-1
    )
    spots = [
        at
        for at, message in enumerate(pending)
        if at > last_answer and message.role == "tool" and message.tool_call_id in place
    ]
    results = sorted((pending[at] for at in spots), key=lambda m: place[m.tool_call_id or ""])
    ordered = list(pending)
    for at, message in zip(spots, results, strict=True):
        ordered[at] = message
    there = {message.tool_call_id for message in results}
    missing = tuple(call for call in calls if call not in there)
    if not missing:
        return Pairing(ordered, [], ())
    first_missing = place[missing[0]]
    ready = 0
    for message in ordered:
        named = place.get(message.tool_call_id or "")
        if ready > last_answer and (named is None or named > first_missing):
            break
        ready += 1
    return Pairing(ordered[:ready], ordered[ready:], missing)


def in_call_order(conversation: Conversation, pending: Sequence[Message]) -> list[Message]:
    """All pending messages, results in the order of their calls."""
    paired = pair(conversation, pending)
    return [*paired.ready, *paired.waiting]


def check_new(
    conversation: Conversation, pending: Sequence[Message], new: Sequence[Message]
) -> None:
    """Refuse results that answer no open call, or one that has its result.

    Raises:
        InvalidInputError: Names the message.
    """
    calls = set(_open_calls(conversation, pending))
    there = {message.tool_call_id for message in pending if message.role == "tool"}
    for at, message in enumerate(new):
        call = message.tool_call_id
        if message.role != "tool" or call is None:
            continue
        if call in there:
            raise InvalidInputError(
                f"messages[{at}].tool_call_id", f"the call {call!r} has its result already"
            )
        if call not in calls:
            open_calls = ", ".join(sorted(calls - there)) or "none"
            raise InvalidInputError(
                f"messages[{at}].tool_call_id",
                f"the last answer has no call {call!r}; calls without a result: {open_calls}",
            )
        there.add(call)


_USER = Message("user", "zq")


def followers(pending: Sequence[Message]) -> list[Message]:
    """Invented messages, one of each kind that may follow the pending ones."""
    last = pending[-1] if pending else _USER
    if last.role == "tool":
        return [_USER, Message("tool", "zq", tool_call_id=last.tool_call_id, name=last.name)]
    return [_USER]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two deltas share."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)
