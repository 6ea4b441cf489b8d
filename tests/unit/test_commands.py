"""Request bodies become commands that no wire form is left in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stateful_sglang.api.native.changes import (
    EditBody,
    ForkBody,
    IngestBody,
    RollbackBody,
    TouchBody,
)
from stateful_sglang.api.native.messages import MessageBody
from stateful_sglang.api.native.schemas import AppendBody, GenerateBody, OpenBody
from stateful_sglang.service import commands, results, sampling
from stateful_sglang.service.commands import (
    Append,
    AskedConstraint,
    Edit,
    Fork,
    Ingest,
    NewMessages,
    NewText,
    NewTokens,
    OpenSession,
    Rollback,
    Touch,
    Writing,
)
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions

USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "integer"}
EDITED = Edit(1, (Message("user", "hello"),), 2)


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


def test_how_to_take_a_turn_is_no_part_of_what_is_asked() -> None:
    asked = command(text="x", on_busy="fail", wait_s=3, expected_version=7)
    assert asked == Append(NewText("x"), writing=Writing("fail", 3.0, 7))


def test_generating_is_an_append_of_nothing() -> None:
    body = GenerateBody.model_validate({"ephemeral": True, "detach": True})
    assert body.to_command() == Append(NewMessages(()), ephemeral=True, detach=True)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (IngestBody(messages=[MessageBody(**USER)]), Ingest((Message("user", "hello"),))),
        (RollbackBody(version=3, wait_s=0), Rollback(3, Writing(wait_s=0))),
        (EditBody(after=1), Edit(1)),
        (EditBody(after=1, through=2, messages=[MessageBody(**USER)]), EDITED),
        (TouchBody(ttl_s=5), Touch(ttl_s=5.0)),
    ],
)
def test_a_change_becomes_its_command(body: Any, expected: Any) -> None:
    assert body.to_command() == expected


def test_a_fork_is_kept_as_its_source_but_for_what_it_says() -> None:
    source = SessionOptions({"a": "b"}, 60.0, "reserved", 3, private=True)
    assert ForkBody(version=2).to_command(source) == Fork(2)
    forked = ForkBody(priority=4).to_command(source)
    assert forked == Fork(None, SessionOptions({"a": "b"}, 60.0, "reserved", 4, private=True))


def test_a_key_covers_what_is_asked_and_not_how_it_is_answered() -> None:
    def digest(body: Any, **fields: Any) -> str:
        return body.model_validate({"idempotency_key": "k", **fields}).to_key().digest

    plain = digest(AppendBody, text="x")
    answers = {"stream": True, "return_output_ids": True, "detach": True}
    waits = {"on_busy": "fail", "wait_s": 1}
    assert digest(AppendBody, text="x", **answers, **waits) == plain
    assert digest(AppendBody, text="x", idempotency_key="other") == plain
    assert digest(AppendBody, text="x", tool_choice="auto", sampling={}) == plain
    assert digest(AppendBody, text="x", sampling={"temperature": 0}) == digest(
        AppendBody, text="x", sampling={"temperature": 0.0}
    )
    others = [
        digest(AppendBody, text="y"),
        digest(AppendBody, messages=[USER]),
        digest(AppendBody, text="x", ephemeral=True),
        digest(AppendBody, text="x", expected_version=1),
        digest(AppendBody, text="x", sampling={"temperature": 0}),
        digest(GenerateBody),
        digest(ForkBody),
        digest(ForkBody, retention="soft"),
        digest(RollbackBody, version=1),
        digest(EditBody, after=1),
        digest(IngestBody, messages=[USER]),
        digest(OpenBody),
    ]
    assert len({plain, *others}) == len(others) + 1


def test_a_request_without_a_key_has_none() -> None:
    assert AppendBody.model_validate({"text": "x"}).to_key() is None


def test_one_stop_text_is_as_good_as_a_list() -> None:
    asked = command(text="x", sampling={"stop": "end", "stop_token_ids": [3], "top_k": 2})
    assert asked.sampling == Sampling(stop=("end",), stop_token_ids=(3,), top_k=2)


def test_an_opening_has_its_head_its_messages_and_its_metadata() -> None:
    body = OpenBody.model_validate(
        {"system": "S", "messages": [USER], "metadata": {"a": "b"}, "ttl_s": 60, "private": True}
    )
    options = SessionOptions({"a": "b"}, ttl_s=60.0, private=True)
    assert body.to_command() == OpenSession(Head("S"), (Message("user", "hello"),), options)


@pytest.mark.parametrize(
    "kind",
    [
        value
        for module in (commands, results, sampling)
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and not issubclass(value, tuple)  # a named one is frozen
    ],
)
def test_commands_and_results_are_frozen(kind: type) -> None:
    parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert dataclasses.fields(kind)
    assert "__slots__" in vars(kind)
