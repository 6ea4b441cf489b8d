"""Delta rendering gives the tokens of rendering everything, without rendering everything."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from chat_families import (
    CHATML,
    FAMILIES,
    QWEN3,
    THINKING_PROMPT,
    Family,
    hermes_call,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stateful_sglang.rendering.delta import DeltaRenderer, RenderedDelta
from stateful_sglang.rendering.templates import TemplateRefusedError
from stateful_sglang.session.conversation import Conversation, absorb_system, advance
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import Head, Message, ToolCall, native_form, plain_form
from stateful_sglang.session.transcript import Transcript

CALL = ToolCall("call00001", "read_file", {"path": "src/app.py", "limit": 20})
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


class Chat:
    """A session as the service keeps it, with scripted answers in the model's place."""

    def __init__(self, family: Family, tokenizer: Any, head: Head | None = None) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.end = family.end_id(tokenizer)
        self.renderer = DeltaRenderer(tokenizer, [self.end])
        self.conversation = Conversation(head or Head())
        self.transcript = Transcript()
        self.rewinds: list[int] = []

    def ask(self, *new: Message) -> RenderedDelta:
        """Render a turn, check it against a full render, and apply it."""
        conversation, messages = self.conversation, list(new)
        if not len(self.transcript):
            head, messages = absorb_system(conversation.head, messages)
            plan = self.renderer.first(head, messages)
        else:
            head = conversation.head
            plan = self.renderer.next(conversation, self.transcript, messages)
        self.rewinds.append(len(self.transcript) - plan.base_len)
        self.transcript = self.transcript.cut(plan.base_len).extended(plan.delta)
        self.conversation = conversation.extended(head, messages)
        return plan

    def answer(self, content: str, *calls: ToolCall, end: bool = True) -> None:
        """Commit a generated answer; without `end` it stopped at a length or a stop string."""
        said = self.family.says(content) if content else ""
        text = said + "\n".join(self.family.call(call) for call in calls)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        raw = self.renderer.answer_text([*ids, self.end] if end else ids)
        tokens = self.renderer.answer_tokens(ids, raw)
        message = Message("assistant", content, calls, raw=raw, tokens=tokens)
        self.commit([*ids, self.end] if end else ids, message)

    def commit(self, ids: list[int], message: Message) -> None:
        """Append generated tokens and the message they are."""
        self.transcript = self.transcript.extended(ids)
        self.conversation = self.conversation.extended(self.conversation.head, [message])

    def append_text(self, text: str) -> None:
        """Append raw text, for which no message stands."""
        rendered = self.renderer.text(text, self.transcript)
        self.transcript = self.transcript.extended(rendered.delta)
        self.conversation = self.conversation.extended(self.conversation.head, None)

    def full(self) -> list[int]:
        """The conversation so far, rendered and tokenised as a whole."""
        head = self.conversation.head
        form = native_form if self.family.native_tools else plain_form
        messages = form(self.conversation.messages)
        if head.system is not None:
            messages.insert(0, {"role": "system", "content": head.system})
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages,
            tools=list(head.tools) or None,
            add_generation_prompt=True,
            return_dict=False,
            **head.template_kwargs,
        )
        return ids


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family: Family, smollm_tokenizer: Any) -> Any:
    return family.tokenizer(smollm_tokenizer)


def user(content: str) -> Message:
    return Message("user", content)


def result(content: str) -> Message:
    return Message("tool", content, tool_call_id=CALL.id, name=CALL.name)


def test_each_turn_adds_exactly_what_the_full_render_adds(family: Family, tokenizer: Any) -> None:
    chat = Chat(family, tokenizer)
    chat.ask(user("Where is the parser?"))
    for question in ("And its tests?", "Thanks. Anything else to know?"):
        chat.answer("In the folder src, I think.")
        plan = chat.ask(user(question))
        assert list(chat.transcript) == chat.full()
        assert plan.rewind_reason is None
    assert chat.rewinds == [0, 0, 0]


def test_tool_calls_and_results_are_appended_in_the_templates_form(
    family: Family, tokenizer: Any
) -> None:
    chat = Chat(family, tokenizer)
    chat.ask(user("Read the file."))
    for _ in range(3):
        chat.answer("", CALL)
        chat.ask(result("def main():\n    pass"))
        assert list(chat.transcript) == chat.full()
    chat.answer("It defines main and nothing else.")
    chat.ask(user("Good."))
    assert list(chat.transcript) == chat.full()
    assert chat.rewinds == [0] * 5


def test_results_answer_the_real_calls(smollm_tokenizer: Any) -> None:
    family = next(each for each in FAMILIES if each.name == "qwen3")
    chat = Chat(family, family.tokenizer(smollm_tokenizer), Head(tools=(TOOL,)))
    chat.ask(user("Read both."))
    chat.answer("", CALL, ToolCall("call00002", "read_file", {"path": "b"}))
    chat.ask(result("one"), Message("tool", "two", tool_call_id="call00002"))
    assert list(chat.transcript) == chat.full()
    assert chat.rewinds == [0, 0]


words = st.lists(
    st.text(st.characters(categories=("L", "N"), max_codepoint=0x2FF), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
).map(" ".join)
turns = st.lists(st.tuples(st.sampled_from(["user", "tool"]), words, words), min_size=1, max_size=6)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=turns, system=st.none() | words, tools=st.booleans(), think=st.booleans())
def test_any_conversation_has_the_tokens_of_its_full_render(
    family: Family, tokenizer: Any, script: Any, system: Any, tools: bool, think: bool
) -> None:
    use_tools = tools and family.native_tools
    head = Head(system if family.system else None, (TOOL,) if use_tools else ())
    chat = Chat(family, tokenizer, head)
    chat.ask(user("begin"))
    thought = "<think>\nwell\n</think>\n\n" if think and "think" in family.rewrites else ""
    for kind, said, asked in script:
        if kind == "tool":
            # Qwen parts what it says from its calls by a line end; the others write one or both.
            chat.answer(thought, CALL)
            chat.ask(result(asked))
        else:
            chat.answer(thought + said)
            chat.ask(user(asked))
        assert list(chat.transcript) == chat.full()
    if not family.rewrites:
        assert set(chat.rewinds) == {0}


@pytest.mark.parametrize("cut", ["length", "stop string"])
def test_an_answer_without_an_end_token_is_closed_by_the_next_delta(
    cut: str, family: Family, tokenizer: Any
) -> None:
    ended, unended = Chat(family, tokenizer), Chat(family, tokenizer)
    for chat in (ended, unended):
        chat.ask(user("Count to nine."))
        chat.answer("one two three", end=chat is ended)
        chat.ask(user("Go on."))
    assert list(ended.transcript) == list(unended.transcript)
    assert unended.rewinds == [0, 0]


def test_a_foreign_end_token_is_replaced_by_the_templates_own(smollm_tokenizer: Any) -> None:
    family = FAMILIES[0]
    ended, foreign = Chat(family, smollm_tokenizer), Chat(family, smollm_tokenizer)
    other = smollm_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    foreign.renderer = DeltaRenderer(smollm_tokenizer, [foreign.end, other])
    for chat in (ended, foreign):
        chat.ask(user("Hello"))
        chat.answer("Hi there", end=chat is ended)
    foreign.transcript = foreign.transcript.extended([other])
    ended.ask(user("Bye"))
    plan = foreign.ask(user("Bye"))
    assert plan.rewind_reason == "end_token"
    assert list(ended.transcript) == list(foreign.transcript)


def test_a_default_system_prompt_comes_once(smollm_tokenizer: Any) -> None:
    chat = Chat(FAMILIES[0], smollm_tokenizer)
    chat.ask(user("Hello"))
    chat.answer("Hi")
    chat.ask(user("Bye"))
    text = smollm_tokenizer.decode(list(chat.transcript))
    assert text.count("You are a helpful AI assistant") == 1


class Counting:
    """A tokenizer that counts what it is asked to render and to encode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.messages, self.characters = tokenizer, 0, 0

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        self.messages += len(conversation)
        return self.tokenizer.apply_chat_template(conversation, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_a_turn_costs_the_same_whatever_the_history(smollm_tokenizer: Any) -> None:
    counting = Counting(smollm_tokenizer)
    chat = Chat(FAMILIES[0], counting)
    costs = []
    chat.ask(user("start"))
    for turn in range(30):
        counting.messages = counting.characters = 0
        chat.answer("", CALL) if turn % 3 else chat.answer("some words")
        chat.ask(result("found it") if turn % 3 else user("next now"))
        costs.append((counting.messages, counting.characters))
    assert len(set(costs[-6:])) <= 3
    assert max(messages for messages, _ in costs) <= 12
    assert max(characters for _, characters in costs) <= 200


def test_a_template_that_strips_thoughts_rewinds_only_when_it_does(smollm_tokenizer: Any) -> None:
    family = next(each for each in FAMILIES if each.template is QWEN3)
    chat = Chat(family, family.tokenizer(smollm_tokenizer), Head(tools=(TOOL,)))
    chat.ask(user("Look"))
    chat.answer("<think>\nI should read.\n</think>\n\n", CALL)
    assert chat.ask(result("text")).rewind_reason is None  # still the same question
    chat.answer("It is text.")
    plan = chat.ask(user("And now?"))  # drops the thought two answers back
    assert plan.rewind_reason == "template_rewrites_history"
    assert chat.rewinds[-1] > 0
    assert list(chat.transcript) == chat.full()


def test_an_answer_that_only_closes_its_thought_extends(smollm_tokenizer: Any) -> None:
    family = Family("thinking", THINKING_PROMPT, "<|im_end|>")
    chat = Chat(family, family.tokenizer(smollm_tokenizer), Head(tools=(TOOL,)))
    chat.ask(user("Look"))
    raw = "let me see\n</think>\n\n" + hermes_call(CALL)
    ids = chat.tokenizer.encode(raw, add_special_tokens=False)
    message = Message("assistant", "let me see\n</think>\n\n", (CALL,), raw=raw)
    chat.commit([*ids, chat.end], message)
    assert chat.ask(result("text")).rewind_reason is None
    assert chat.rewinds[-1] == 0
    assert list(chat.transcript) == chat.full()


def test_a_prompt_with_an_empty_thought_is_rewritten(smollm_tokenizer: Any) -> None:
    family = Family("qwen3-nothink", QWEN3, "<|im_end|>")
    head = Head(template_kwargs={"enable_thinking": False})
    chat = Chat(family, family.tokenizer(smollm_tokenizer), head)
    chat.ask(user("Hello"))
    chat.answer("Hi")
    assert chat.ask(user("Bye")).rewind_reason == "template_rewrites_history"
    assert list(chat.transcript) == chat.full()


def test_a_template_with_todays_date_does_not_rewind_at_midnight(smollm_tokenizer: Any) -> None:
    dated = "{{ '<|im_start|>' + strftime_now('%f') }}" + CHATML
    chat = Chat(Family("dated", dated, "<|im_end|>"), _with(smollm_tokenizer, dated))
    chat.ask(user("Hello"))
    chat.answer("Hi")
    clock = chat.tokenizer.chat_template
    chat.tokenizer.chat_template = clock.replace("strftime_now('%f')", "'Monday'")
    chat.ask(user("Bye"))
    chat.answer("Bye")
    chat.tokenizer.chat_template = clock.replace("strftime_now('%f')", "'Tuesday'")
    chat.ask(user("Hello?"))
    assert chat.rewinds == [0, 0, 0]


def _with(base: Any, template: str) -> Any:
    return Family("any", template, "<|im_end|>").tokenizer(base)


def test_tools_reach_a_template_without_them_through_the_system_prompt(
    smollm_tokenizer: Any,
) -> None:
    chat = Chat(FAMILIES[0], smollm_tokenizer, Head("Be brief.", (TOOL,)))
    plan = chat.ask(user("Hello"))
    text = smollm_tokenizer.decode(plan.delta.tolist())
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "read_file"' in text


def test_messages_after_text_close_the_text(smollm_tokenizer: Any) -> None:
    chat = Chat(FAMILIES[0], smollm_tokenizer)
    chat.append_text("Once upon a time")
    chat.ask(user("Who?"))
    assert smollm_tokenizer.decode(list(chat.transcript)) == (
        "Once upon a time<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_after_text_are_refused_where_history_is_rewritten(smollm_tokenizer: Any) -> None:
    family = Family("qwen3-nothink", QWEN3, "<|im_end|>")
    head = Head(template_kwargs={"enable_thinking": False})
    chat = Chat(family, family.tokenizer(smollm_tokenizer), head)
    chat.append_text("Once")
    with pytest.raises(InvalidInputError, match="rewrites earlier turns"):
        chat.ask(user("Who?"))


def test_what_a_template_refuses_is_reported_in_its_words(smollm_tokenizer: Any) -> None:
    family = next(each for each in FAMILIES if each.name == "gemma")
    renderer = DeltaRenderer(family.tokenizer(smollm_tokenizer), [2])
    with pytest.raises(TemplateRefusedError, match="System role not supported"):
        renderer.check_head(Head("Be brief."))


def test_the_shape_of_a_long_tool_loop_stays_short() -> None:
    shape = advance((), [user("go")])
    for turn in range(1000):
        text = "<think>x</think>" if turn % 2 else ""
        shape = advance(shape, [Message("assistant", text, (CALL,)), result("a"), result("b")])
    assert len(shape) <= 4


@given(st.lists(st.integers(0, 50000), max_size=9000), st.integers(0, 9000), st.integers(0, 50000))
def test_common_prefix_is_what_a_token_by_token_comparison_finds(
    tokens: list[int], at: int, other: int
) -> None:
    changed = [other if index == at else token for index, token in enumerate(tokens)]
    expected = next(
        (
            index
            for index, pair in enumerate(zip(tokens, changed, strict=True))
            if pair[0] != pair[1]
        ),
        len(tokens),
    )
    assert Transcript(tokens).common_prefix(array("q", changed)) == expected
