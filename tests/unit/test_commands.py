"""Request bodies become commands that no wire form is left in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stateful_sglang.api.native.schemas import AppendBody, OpenBody
from stateful_sglang.service import commands, results, sampling
from stateful_sglang.service.commands import (
    Append,
    AskedConstraint,
    NewMessages,
    NewText,
    NewTokens,
    OpenSession,
)
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.session.messages import Head, Message

USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "integer"}


def command(**fields: Any) -> Append:
    return AppendBody.model_validate(fields).to_command()


@pytest.mark.parametrize(
    ("given", "content"),
    [
        ({"messages": [USER]}, NewMessages((Message("user", "hello"),))),
        ({"text": "once"}, NewText("once")),
        ({"input_ids": [1, 2]}, NewTokens([1, 2])),
    ],
)
def test_an_append_has_one_content(given: Any, content: Any) -> None:
    assert command(**given) == Append(content)


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"regex": "a+"}, AskedConstraint("regex", "a+", "sampling.regex")),
        ({"ebnf": 'root ::= "a"'}, AskedConstraint("ebnf", 'root ::= "a"', "sampling.ebnf")),
        (
            {"json_schema": SCHEMA},
            AskedConstraint("json_schema", '{"type": "integer"}', "sampling.json_schema"),
        ),
        (
            {"json_schema": '{"type":"integer"}'},
            AskedConstraint("json_schema", '{"type": "integer"}', "sampling.json_schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            AskedConstraint("json_schema", '{"type": "integer"}', "sampling.response_format"),
        ),
        (
            {"response_format": {"type": "json_object"}},
            AskedConstraint("json_schema", '{"type": "object"}', "sampling.response_format"),
        ),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_a_constraint_names_the_field_it_came_in(asked: Any, constraint: Any) -> None:
    assert command(text="x", sampling=asked).constraint == constraint


def test_one_stop_text_is_as_good_as_a_list() -> None:
    asked = command(text="x", sampling={"stop": "end", "stop_token_ids": [3], "top_k": 2})
    assert asked.sampling == Sampling(stop=("end",), stop_token_ids=(3,), top_k=2)


def test_an_opening_has_its_head_its_messages_and_its_metadata() -> None:
    body = OpenBody.model_validate({"system": "S", "messages": [USER], "metadata": {"a": "b"}})
    expected = OpenSession(Head("S"), (Message("user", "hello"),), {"a": "b"})
    assert body.to_command() == expected


@pytest.mark.parametrize(
    "kind",
    [
        value
        for module in (commands, results, sampling)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ],
)
def test_commands_and_results_are_frozen(kind: type) -> None:
    parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert dataclasses.fields(kind)
    assert "__slots__" in vars(kind)
