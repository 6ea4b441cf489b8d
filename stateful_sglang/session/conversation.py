"""A session's messages, and their shape: the little of a history that a chat template looks at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.shared import Shared

Shape = tuple[tuple[str, ...], ...]
"""Kinds of messages since the last user message, a tuple for each step: the user's, then one for
each assistant message with the results that follow it. Steps that repeat are kept once, so the
shape of a loop of a thousand tool calls is as short as that of two."""

RAW_SHAPE: Shape = (("user",), ("assistant",))
"""What a template is told of a history that was appended as text or tokens."""


@dataclass(frozen=True)
class Conversation:
    """The messages behind a transcript, as they were at one commit."""

    head: Head = field(default_factory=Head)
    messages: Shared[Message] = field(default_factory=Shared)
    """Their storage is shared with the conversations that this one grew from."""
    shape: Shape = ()
    raw: bool = False
    """Text or tokens were appended, so the messages alone don't make up the transcript."""

    def extended(self, head: Head, messages: Sequence[Message] | None) -> Conversation:
        """This conversation with new messages behind it, in time proportional to how many.

        Args:
            head: Its head from now on.
            messages: None where text or tokens were appended instead.
        """
        if messages is None:
            return replace(self, head=head, raw=True)
        shape = advance(self.shape, messages)
        return replace(self, head=head, messages=self.messages.extended(messages), shape=shape)


def absorb_system(head: Head, messages: Sequence[Message]) -> tuple[Head, list[Message]]:
    """Move a leading system message into a head that has none."""
    if head.system is None and messages and messages[0].role == "system":
        return replace(head, system=messages[0].content), list(messages[1:])
    return head, list(messages)


def advance(shape: Shape, messages: Iterable[Message]) -> Shape:
    """The shape after appending `messages`."""
    for message in messages:
        kind = kind_of(message)
        if message.role == "user":
            shape = ((kind,),)
        elif message.role == "assistant":
            if shape[:-1] and shape[-1] in shape[:-1]:
                shape = shape[:-1]
            shape = (*shape, (kind,))
        elif not shape:
            shape = ((kind,),)
        elif shape[-1][-1] != kind:
            shape = (*shape[:-1], (*shape[-1], kind))
    return shape


def kind_of(message: Message) -> str:
    """What a template may tell apart about a message: role, calls, and whether it was thinking."""
    if message.role != "assistant":
        return message.role
    kind = "assistant"
    if message.tool_calls:
        kind += "+calls"
    text = message.content if message.raw is None else message.raw
    if "</think>" in text:
        # Where the prompt opens the block already, the answer only closes it.
        kind += "+think" if "<think>" in text else "+thought"
    return kind
