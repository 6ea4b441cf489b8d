"""Conversations as they are compared: what clients change on the way makes no difference."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.session.messages import Message, ToolCall
from stateful_sglang.session.said import (
    Difference,
    canonical,
    digests,
    first_difference,
    one_more,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), JSON, max_size=3)
TEXT = st.text(max_size=6)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Messages in which results answer calls that were made."""
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for number in range(draw(st.integers(0, 4))):
        messages.append(Message("user", draw(TEXT)))
        calls = tuple(
            ToolCall(f"call-{number}-{at}", draw(st.sampled_from("fg")), arguments)
            for at, arguments in enumerate(draw(st.lists(ARGUMENTS, max_size=2)))
        )
        messages.append(Message("assistant", draw(TEXT), calls))
        messages += [Message("tool", draw(TEXT), (), call.id) for call in calls]
    return messages


@given(conversations(), st.randoms(use_true_random=False))
def test_ids_and_serialisation_of_calls_and_white_space_around_answers_say_nothing(
    messages: list[Message], random: Any
) -> None:
    renamed: dict[str, str] = {}

    def resent(message: Message) -> Message:
        calls = []
        for call in message.tool_calls:
            renamed[call.id] = f"toolu_{len(renamed)}"
            items = list(call.arguments.items())
            random.shuffle(items)
            arguments: Any = dict(items)
            if random.random() < 0.5:
                arguments = json.dumps(arguments, indent=1, ensure_ascii=random.random() < 0.5)
            calls.append(ToolCall(renamed[call.id], call.name, arguments))
        content = message.content
        if message.role == "assistant":
            content = f" \n{content}\n"
        named = renamed.get(message.tool_call_id or "")
        return Message(message.role, content, tuple(calls), named)

    again = [resent(message) for message in messages]
    assert canonical(again) == canonical(messages)


@given(conversations(), conversations(), st.text(max_size=3), st.text(max_size=3))
def test_equal_digests_are_of_equal_beginnings_in_one_scope(
    one: list[Message], other: list[Message], scope: str, another: str
) -> None:
    left, right = canonical(one), canonical(other)
    ours, theirs = digests(scope, left), digests(another, right)
    assert len(ours) == len(left) + 1
    for at, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        assert (mine == yours) == (scope == another and left[:at] == right[:at])
    if left:
        assert one_more(ours[-2], left[-1]) == ours[-1]


@given(conversations(), conversations())
def test_a_difference_is_told_where_it_is(one: list[Message], other: list[Message]) -> None:
    left, right = canonical(one), canonical(other)
    found = first_difference(left, right)
    shorter = min(len(left), len(right))
    if found is None:
        assert left[:shorter] == right[:shorter]
        return
    assert left[: found.message] == right[: found.message]
    assert getattr(left[found.message], found.field) != getattr(right[found.message], found.field)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ([Message("user", "abc")], [Message("user", "abd")], Difference(0, "content", 2)),
        ([Message("user", "a")], [Message("system", "a")], Difference(0, "role", 0)),
        ([Message("user", "a"), Message("user", "b")], [Message("user", "a")], None),
        (
            [Message("assistant", "", (ToolCall("1", "f", {"a": 1}),))],
            [Message("assistant", "", (ToolCall("2", "f", {"a": 2}),))],
            Difference(0, "calls", 15),
        ),
    ],
)
def test_differences_have_message_field_and_offset(
    one: list[Message], other: list[Message], found: Difference | None
) -> None:
    assert first_difference(canonical(one), canonical(other)) == found


def test_a_result_names_its_call_by_place_and_another_by_its_id() -> None:
    calls = (ToolCall("a", "f", {}), ToolCall("b", "f", {}))
    said = canonical(
        [
            Message("assistant", "", calls),
            Message("tool", "x", (), "b"),
            Message("tool", "y", (), "c"),
        ]
    )
    assert [each.answers for each in said] == [None, 1, "c"]
