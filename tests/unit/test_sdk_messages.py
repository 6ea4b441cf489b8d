"""Messages as SDKs dump them are taken as what they say."""

from __future__ import annotations

from typing import Any

import pytest
from chat_families import FAMILIES
from openai.types.chat import (
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ParsedChatCompletionMessage,
)
from openai.types.chat.chat_completion_message import Annotation
from openai.types.chat.chat_completion_message_function_tool_call import Function
from pydantic import ValidationError

from stateful_sglang.api.errors import from_validation
from stateful_sglang.api.native.message_fields import IGNORED_FIELDS
from stateful_sglang.api.native.schemas import AppendBody, MessageBody, OpenBody
from stateful_sglang.rendering.delta import DeltaRenderer
from stateful_sglang.rendering.templates import TemplateRefusedError
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import Head, Message, ToolCall

CALL = ChatCompletionMessageFunctionToolCall(
    id="call00001",
    type="function",
    function=Function(name="read_file", arguments='{"path": "a"}'),
)
TAKEN_CALL = ToolCall("call00001", "read_file", {"path": "a"})


def taken(**fields: Any) -> Message:
    return MessageBody.model_validate(fields).to_message()


def refused(**fields: Any) -> InvalidInputError:
    with pytest.raises(ValidationError) as caught:
        AppendBody.model_validate({"messages": [{"role": "user", "content": "x"}] * 3 + [fields]})
    return from_validation(caught.value.errors())


OPENAI = [
    (ChatCompletionMessage(role="assistant", content="Hi."), Message("assistant", "Hi.")),
    (
        ChatCompletionMessage(role="assistant", content=None, tool_calls=[CALL]),
        Message("assistant", "", (TAKEN_CALL,)),
    ),
    (
        ChatCompletionMessage(role="assistant", content="", tool_calls=[]),
        Message("assistant", ""),
    ),
    (
        ChatCompletionMessage(role="assistant", content=None, refusal="I can't help with that."),
        Message("assistant", "I can't help with that."),
    ),
    (
        ChatCompletionMessage(
            role="assistant",
            content="See there.",
            annotations=[
                Annotation.model_validate(
                    {
                        "type": "url_citation",
                        "url_citation": {
                            "start_index": 0,
                            "end_index": 3,
                            "title": "t",
                            "url": "u",
                        },
                    }
                )
            ],
        ),
        Message("assistant", "See there."),
    ),
    (
        ParsedChatCompletionMessage[Any](role="assistant", content='{"a": 1}', parsed={"a": 1}),
        Message("assistant", '{"a": 1}'),
    ),
]


@pytest.mark.parametrize(("dumped", "message"), OPENAI, ids=range(len(OPENAI)))
@pytest.mark.parametrize("exclude_none", [False, True])
def test_what_the_openai_package_dumps_is_what_it_says(
    dumped: ChatCompletionMessage, message: Message, exclude_none: bool
) -> None:
    assert taken(**dumped.model_dump(exclude_none=exclude_none)) == message


LITELLM = {
    "content": None,
    "role": "assistant",
    "tool_calls": [
        {
            "index": 0,
            "function": {"arguments": '{"path": "a"}', "name": "read_file"},
            "id": "call00001",
            "type": "function",
            "provider_specific_fields": None,
        }
    ],
    "function_call": None,
    "provider_specific_fields": {"refusal": None},
    "reasoning_content": "I should read.",
    "thinking_blocks": [{"type": "thinking", "thinking": "I should read.", "signature": "s"}],
    "annotations": [],
    "images": [],
}
"""LiteLLM's message of a reasoning model."""
LANGCHAIN = {
    "role": "assistant",
    "content": [{"type": "text", "text": "Hi", "annotations": []}],
    "name": None,
    "tool_calls": None,
    "function_call": None,
    "audio": None,
    "refusal": None,
    "id": "run-1",
}
"""What LangChain's converter to OpenAI's form leaves of a message."""


def test_what_other_sdks_dump_is_what_it_says() -> None:
    assert taken(**LITELLM) == Message("assistant", "", (TAKEN_CALL,))
    assert taken(**LANGCHAIN) == Message("assistant", "Hi")


def test_nothing_is_lost_by_an_empty_or_missing_field_of_any_name() -> None:
    for empty in (None, "", [], {}):
        fields = {"role": "user", "content": "Hi", "name": empty, "audio": empty, "novel": empty}
        if isinstance(empty, list | dict):
            del fields["name"]
        assert taken(**fields) == Message("user", "Hi")
    assert (
        taken(role="assistant") == taken(role="assistant", content=[]) == Message("assistant", "")
    )
    assert taken(role="user", content="") == Message("user", "")
    assert taken(role="system", content="") == Message("system", "")


def test_a_developer_is_the_system() -> None:
    assert taken(role="developer", content="Be brief.") == Message("system", "Be brief.")
    with pytest.raises(ValidationError, match="begin with a system message"):
        OpenBody.model_validate(
            {"system": "a", "messages": [{"role": "developer", "content": "b"}]}
        )


def test_a_tools_result_may_be_a_list_of_text_parts() -> None:
    parts = [
        {"type": "text", "text": "one ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "two", "annotations": None},
    ]
    message = taken(role="tool", content=parts, tool_call_id="call00001", name=None)
    assert message == Message("tool", "one two", tool_call_id="call00001")
    refused_part = {"type": "refusal", "refusal": "No."}
    assert taken(role="assistant", content=[refused_part]) == Message("assistant", "No.")


def test_a_call_without_arguments_has_none() -> None:
    function = {"name": "f", "arguments": ""}
    message = taken(role="assistant", tool_calls=[{"id": "c", "function": function}])
    assert message.tool_calls == (ToolCall("c", "f", {}),)


def test_a_tool_definition_may_carry_what_is_ignored() -> None:
    tool = {"type": "function", "function": {"name": "f"}, "cache_control": {"type": "ephemeral"}}
    assert OpenBody.model_validate({"tools": [tool]}).to_head().tool_names() == ["f"]
    assert "cache_control" not in OpenBody.model_validate({"tools": [tool]}).to_head().tools[0]


CALLING = {"role": "assistant", "content": None}
CALLED = {"name": "f", "arguments": "{}"}
REFUSED = [
    ({**CALLING, "audio": {"id": "audio_1"}}, "messages[3].audio"),
    ({**CALLING, "images": [{"url": "u"}]}, "messages[3].images"),
    ({**CALLING, "function_call": {"name": "f", "arguments": ""}}, "messages[3].function_call"),
    (
        {**CALLING, "tool_calls": [{**CALL.model_dump(), "status": "done"}]},
        "messages[3].tool_calls[0].status",
    ),
    (
        {
            **CALLING,
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "", "x": 1}}],
        },
        "messages[3].tool_calls[0].function.x",
    ),
    (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
        "messages[3].content[1]",
    ),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[3].content[0]"),
    ({"role": "user", "content": "x", "refusal": "y"}, "messages[3]"),
    ({"role": "tool", "tool_call_id": "c", "content": None}, "messages[3]"),
]


@pytest.mark.parametrize(("message", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_field_that_carries_something_we_cannot_take_is_named(
    message: dict[str, Any], param: str
) -> None:
    error = refused(**message)
    assert error.param == param
    assert param.rsplit(".", 1)[-1].split("[")[0] in f"{error.message} messages content"


def test_every_ignored_field_is_ignored_and_has_its_reason() -> None:
    something = {"anything": [1]}
    call = CALL.model_dump()
    for kind, names in IGNORED_FIELDS.items():
        for name, reason in names.items():
            assert reason
            extra = {name: something}
            if kind == "message":
                assert taken(role="user", content="x", **extra) == Message("user", "x")
            elif kind == "part":
                part = {"type": "text", "text": "x", **extra}
                assert taken(role="user", content=[part]) == Message("user", "x")
            elif kind == "tool_call":
                message = taken(role="assistant", tool_calls=[{**call, **extra}])
                assert message.tool_calls == (TAKEN_CALL,)
            elif kind == "function":
                function = {**call["function"], **extra}
                message = taken(role="assistant", tool_calls=[{**call, "function": function}])
                assert message.tool_calls == (TAKEN_CALL,)
            else:
                assert kind == "tool"
                tool = {"function": {"name": "f"}, **extra}
                assert OpenBody.model_validate({"tools": [tool]}).to_head().tool_names() == ["f"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_later_system_message_is_rendered_or_refused_as_such(
    family: Any, smollm_tokenizer: Any
) -> None:
    tokenizer = family.tokenizer(smollm_tokenizer)
    renderer = DeltaRenderer(tokenizer, [family.end_id(tokenizer)])
    messages = [Message("user", "one"), Message("assistant", "two"), Message("system", "zqlater")]
    messages.append(Message("user", "three"))
    head = Head("first" if family.system else None)
    if family.name in ("mistral", "gemma"):
        with pytest.raises(TemplateRefusedError, match="no system message after the first"):
            renderer.first(head, messages)
        return
    assert "zqlater" in tokenizer.decode(renderer.first(head, messages).delta.tolist())


def test_a_template_that_drops_a_later_system_message_is_not_followed(
    smollm_tokenizer: Any,
) -> None:
    tokenizer = FAMILIES[1].tokenizer(smollm_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}"
    )
    renderer = DeltaRenderer(tokenizer, [2])
    with pytest.raises(TemplateRefusedError, match="no system message after the first"):
        renderer.first(Head("S"), [Message("user", "a"), Message("system", "T")])
    renderer.first(Head("S"), [Message("user", "a")])
