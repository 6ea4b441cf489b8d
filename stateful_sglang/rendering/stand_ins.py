"""Invented messages that stand for a history of the same shape: rendering it would be long."""

from __future__ import annotations

from stateful_sglang.session.conversation import Shape
from stateful_sglang.session.messages import Message, ToolCall

PROBE_NAME = "zqprobe"
"""A word that no template contains, as the next one."""
PROBE_ARGUMENT = "zqargument"
PROBE_CALL = ToolCall(id="zq0000000", name=PROBE_NAME, arguments={"zq": PROBE_ARGUMENT})
"""Its id is nine alphanumerics: some templates insist."""


def stand_ins(shape: Shape) -> list[Message]:
    """A short conversation of this shape, with invented words."""
    return [stand_in(kind, "zqearlier") for step in shape for kind in step]


def stand_in(kind: str, words: str) -> Message:
    """One message of a kind, as `kind_of` names it, saying `words`."""
    role, *flags = kind.split("+")
    if role == "tool":
        return Message(role, words, tool_call_id=PROBE_CALL.id, name=PROBE_CALL.name)
    if role != "assistant":
        return Message(role, words)
    if "think" in flags:
        words = f"<think>\nzqthought\n</think>\n\n{words}"
    elif "thought" in flags:
        words = f"zqthought\n</think>\n\n{words}"
    return Message(role, words, (PROBE_CALL,) if "calls" in flags else ())
