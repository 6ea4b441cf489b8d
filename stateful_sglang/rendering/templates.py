"""A model's chat template: what it can render, and rendering with its refusals made readable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from stateful_sglang.rendering.stand_ins import PROBE_CALL, PROBE_NAME
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import (
    Head,
    Message,
    native_form,
    plain_form,
    tool_prompt,
)

_PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": PROBE_NAME,
        "parameters": {"type": "object", "properties": {"zq": {"type": "string"}}},
    },
}

RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of `apply_chat_template` that are not the session's to set."""


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any: ...


class TemplateRefusedError(InvalidInputError):
    """The chat template raised on these messages."""


class ChatTemplate:
    """Renders conversations; finds out once which forms the template knows."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template renders tool definitions."""
        rendered = self._try([_user()], tools=[_PROBE_TOOL])
        return rendered is not None and PROBE_NAME in rendered

    @cached_property
    def knows_tool_messages(self) -> bool:
        """Whether calls and results have a form of the template's own.

        A template that writes out any role whatever has none for tools.
        """
        result = {"role": "tool", "content": "zqresult", "name": PROBE_NAME}
        result["tool_call_id"] = PROBE_CALL.id
        calls = native_form([Message("assistant", "", (PROBE_CALL,))])
        native = self._try([_user(), *calls, result])
        if native is None or PROBE_NAME not in native or "zqresult" not in native:
            return False
        said = {"role": "assistant", "content": "zq"}
        as_tool = self._try([_user(), said, result])
        as_any = self._try([_user(), said, {**result, "role": PROBE_NAME}])
        return (
            as_any is None
            or as_tool is None
            or as_any.replace(PROBE_NAME, "tool") != (as_tool.replace(PROBE_NAME, "tool"))
        )

    @cached_property
    def takes_later_system(self) -> bool:
        """Whether a system message further down is rendered, neither left out nor refused."""
        later = {"role": "system", "content": PROBE_NAME}
        said = {"role": "assistant", "content": "zq"}
        rendered = self._try([_user(), said, later, _user()])
        if rendered is None:
            # Whether it is the message that the template minds.
            return self._try([_user(), said, _user()]) is None
        return PROBE_NAME in rendered

    def render(
        self, head: Head, messages: Sequence[Message], *, generation_prompt: bool, native: bool
    ) -> str:
        """The whole conversation as text.

        Args:
            native: Use the template's own form of calls and results; else the plain one.

        Raises:
            TemplateRefusedError: The template raised, or the model has none.
        """
        if not self.takes_later_system and any(each.role == "system" for each in messages):
            raise TemplateRefusedError(
                "messages",
                "the model's chat template renders no system message after the first; put it into "
                "the system prompt, or send it as a user message",
            )
        conversation = native_form(messages) if native else plain_form(messages)
        system, tools = head.system, list(head.tools) or None
        if tools and not self.takes_tools and not head.verbatim:
            system = "\n\n".join(part for part in (system, tool_prompt(tools)) if part)
            tools = None
        if system is not None:
            conversation.insert(0, {"role": "system", "content": system})
        try:
            return self._apply(conversation, tools, generation_prompt, head.template_kwargs)
        except Exception as error:  # jinja raises its own and whatever the template stumbles on
            raise TemplateRefusedError(
                "messages", f"the model's chat template refuses these messages: {error}"
            ) from error

    def _apply(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        generation_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(conversation),
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **kwargs,
        )
        return text

    def _try(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str | None:
        try:
            return self._apply(conversation, tools, True, {})
        except Exception:
            return None


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "zq"}
