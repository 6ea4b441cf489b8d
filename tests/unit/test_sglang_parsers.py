"""SGLang's own parsers are used where the server names one."""

from __future__ import annotations

import pytest

from stateful_sglang.cpu.platform import prepare
from stateful_sglang.service.tool_calls import openai_form

TOOLS = ({"type": "function", "function": {"name": "search"}},)


prepare()

from stateful_sglang.runtime.sessions.tool_calls import (  # noqa: E402 - SGLang comes after prepare()
    parse_with_sglang,
)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("qwen25", 'Yes.\n<tool_call>\n{"name": "search", "arguments": {"q": "a"}}\n</tool_call>'),
        ("mistral", 'Yes.[TOOL_CALLS] [{"name": "search", "arguments": {"q": "a"}}]'),
        ("llama3", 'Yes.<|python_tag|>{"name": "search", "parameters": {"q": "a"}}'),
    ],
)
def test_a_named_parser_finds_its_models_calls(parser: str, text: str) -> None:
    content, calls = parse_with_sglang(text, TOOLS, parser, None)
    assert content.strip() == "Yes."
    (call,) = openai_form(calls)
    assert call["function"] == {"name": "search", "arguments": '{"q": "a"}'}


def test_an_answer_that_a_parser_stumbles_on_stays_text() -> None:
    content, calls = parse_with_sglang("<tool_call>{broken", TOOLS, "qwen25", None)
    assert ("broken" in content, calls) == (True, ())
    assert parse_with_sglang("hello", TOOLS, "no such parser", None) == ("hello", ())
