"""SGLang's chat route, each of whose requests continues the session that its messages name.

All of SGLang's request building and response building stays. What is left out is rendering and
tokenising what the server knows: on the way in, a request whose beginning is known gets a stand-in
for its prompt, and the conversation beside it, from which the turn is planned on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from fastapi import HTTPException
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionResponse
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.requests import Request

from stateful_sglang.api.errors import status_of
from stateful_sglang.api.openai.reuse import STATE
from stateful_sglang.api.openai.said import NotTextError, messages_of
from stateful_sglang.api.streaming import unless_left
from stateful_sglang.attachments.check import Attachment
from stateful_sglang.service.commands import Caller
from stateful_sglang.service.conversations import Conversation, ImplicitTurn
from stateful_sglang.service.engine import EngineError, TurnProgress
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.errors import SessionError
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions
from stateful_sglang.session.said import Recital
from stateful_sglang.tenants.salts import narrowed

_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
ATTACHMENTS = (
    Attachment(
        f"{_CHAT}._convert_to_internal_request",
        "subclass",
        "a request whose conversation is known is neither rendered nor tokenised",
    ),
    Attachment(
        f"{_CHAT}._process_messages",
        "relies",
        "token ids that stand for the messages leave out rendering, and nothing else",
    ),
    Attachment(
        f"{_CHAT}._build_chat_response",
        "relies",
        "says what an answer is to its client, who will say it again",
    ),
    Attachment(
        "sglang.srt.entrypoints.openai.protocol.ChatCompletionRequest",
        "relies",
        "its fields say what of a request a session can serve",
    ),
    Attachment(
        "sglang.srt.entrypoints.openai.protocol.ChatCompletionResponse",
        "relies",
        "an answer that was built, and no error",
    ),
    Attachment(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.serving_chat_class",
        "subclass",
        "SGLang's routes for chat and for Anthropic's messages make their requests with this class",
    ),
)

_STAND_IN = (0,)
"""Token ids in the place of a prompt that is not rendered; never sent to the scheduler."""


@dataclass
class ConversationInput(GenerateReqInput):
    """A generate request whose prompt is what a conversation adds to its session."""

    conversation: Any = None


class Conversations(NamedTuple):
    """What the route needs of the server."""

    service: SessionService
    caller_of: Callable[[Request], Caller]
    """Whose request it is."""
    check: Callable[[GenerateReqInput], None]
    """Raises `ValueError` where the scheduler can't take a request."""
    exact: bool = False
    """Every request is rendered as SGLang renders it."""


def over(conversations: Conversations) -> type[ImplicitChat]:
    """The chat route's class over a server's sessions."""
    return type("ServerChat", (ImplicitChat,), {"conversations": conversations})


class ImplicitChat(OpenAIServingChat):  # type: ignore[misc]
    """SGLang's chat route over implicit sessions."""

    conversations: Conversations

    def _convert_to_internal_request(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> tuple[GenerateReqInput, ChatCompletionRequest]:
        if raw_request is None or self._why_stock(request) is not None:
            return super()._convert_to_internal_request(request, raw_request)  # type: ignore[no-any-return]
        try:
            dumped = [message.model_dump() for message in request.messages]
            messages = messages_of(dumped, self._joiner)
        except NotTextError:
            return super()._convert_to_internal_request(request, raw_request)  # type: ignore[no-any-return]
        caller = self.conversations.caller_of(raw_request)
        asked = Asked(self, request, raw_request, messages)
        service, exact = self.conversations.service, self.conversations.exact
        head = asked.head()
        recital = service.recital(caller, asked.scope(), head, messages)
        known = not exact and service.knows(recital)
        if known:
            request.input_ids = list(_STAND_IN)
        try:
            wire, request = super()._convert_to_internal_request(request, raw_request)
        finally:
            if known:
                request.input_ids = None
        if not isinstance(wire.input_ids, list) or wire.extra_key is not None:
            return wire, request
        rendered = None if known else wire.input_ids
        conversation = asked.conversation(recital, head, wire, rendered)
        values = {field.name: getattr(wire, field.name) for field in fields(GenerateReqInput)}
        return ConversationInput(**values, conversation=conversation), request

    def _why_stock(self, request: ChatCompletionRequest) -> str | None:
        """The field of a request that no session can serve; None where one can."""
        if request.n != 1:
            return "n"
        for field in (
            "input_ids",
            "continue_final_message",
            "return_prompt_token_ids",
            "return_token_ids",
            "return_input_ids_in_sglext",
            "custom_logit_processor",
            "extra_key",
            "lora_path",
            "bootstrap_host",
            "rid",
        ):
            if getattr(request, field, None):
                return field
        if ":" in request.model and self._parse_model_parameter(request.model)[1]:
            return "model"
        if request.messages[-1].role == "assistant":
            return "messages"
        manager = self.tokenizer_manager
        special = (
            manager.model_config.is_multimodal
            or self.chat_encoding_spec is not None
            or self.is_gpt_oss
            or self.template_manager.chat_template_name is not None
            or self._requires_response_template_detokenization(request)
        )
        return "model" if special else None

    @property
    def _joiner(self) -> str:
        return " " if self.template_manager.jinja_template_content_format == "string" else ""


class Asked:
    """A chat request on its way to its session."""

    def __init__(
        self,
        serving: ImplicitChat,
        request: ChatCompletionRequest,
        raw_request: Request,
        messages: list[Message],
    ) -> None:
        self._serving = serving
        self._request = request
        self._raw_request = raw_request
        self._messages = messages

    def head(self) -> Head:
        """Tools and what the template is told, as SGLang hands them to it."""
        request = self._request
        choice = request.tool_choice
        tools: list[dict[str, Any]] = []
        if request.tools and choice != "none":
            named = None if isinstance(choice, str) else choice.function.name
            tools = [
                tool.model_dump()
                for tool in request.tools
                if named is None or tool.function.name == named
            ]
        kwargs: dict[str, Any] = {}
        if request.reasoning_effort is not None:
            kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs |= self._serving.default_chat_template_kwargs or {}
        kwargs |= request.chat_template_kwargs or {}
        return Head(None, tuple(tools), kwargs, verbatim=True)

    def scope(self) -> str:
        """What else must be equal for two requests to share a session."""
        return json.dumps([self._request.model, self._request.cache_salt])

    def conversation(
        self, recital: Recital, head: Head, wire: GenerateReqInput, rendered: list[int] | None
    ) -> Conversation:
        """For the service of sessions."""
        return Conversation(
            head=head,
            messages=self._messages,
            recital=recital,
            wire=wire,
            first=lambda: self._render(rendered),
            read=self._read,
            stream=bool(self._request.stream),
            exact=self._serving.conversations.exact,
            options=SessionOptions(metadata={"opened_by": "chat"}),
            repeats=self._repeats(),
        )

    async def _render(self, rendered: list[int] | None) -> array[int]:
        if rendered is None:
            process = self._serving._process_messages
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(None, process, self._request, False)
            rendered = result.prompt_ids
        return array("q", rendered)

    def _read(self, last: TurnProgress) -> Message:
        """The answer as the client gets it, and will say it again."""
        built = self._serving._build_chat_response(self._request, [last.report], 0)
        if not isinstance(built, ChatCompletionResponse):
            return Message("assistant", last.text)
        dumped = built.choices[0].message.model_dump()
        return messages_of([dumped], "")[0]

    def _repeats(self) -> str | None:
        """Digest of a request that repeats one which its client gave up, or may be repeated so.

        Sampled answers to equal requests are meant to differ: those are told from a repeated one by
        what clients that send again say of it.
        """
        headers = self._raw_request.headers
        again = headers.get("x-stainless-retry-count", "0") != "0"
        key = headers.get("idempotency-key")
        if not again and not key and self._request.temperature != 0:
            return None
        body = self._request.model_dump_json(exclude={"rid"}) + repr(key)
        return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


async def follow(
    conversations: Conversations, obj: ConversationInput, request: Request
) -> AsyncIterator[Mapping[str, Any]]:
    """Run a conversation's turn; yields what SGLang's manager would of an ordinary request."""
    conversations.check(obj)
    obj.normalize_batch_and_arguments()
    caller = conversations.caller_of(request)
    caller = replace(caller, salt=narrowed(caller.salt, obj.cache_salt))
    try:
        started: ImplicitTurn = await unless_left(
            request.receive,
            conversations.service.converse(caller, obj.conversation),
            unwanted=lambda turn: turn.reader.leave(),
        )
    except SessionError as error:
        raise _told(error) from error
    reader, reuse = started
    setattr(request.state, STATE, reuse)
    try:
        if not obj.stream:
            await unless_left(request.receive, reader.wait())
        async for report in reader.reports():
            yield report
        try:
            await reader.result()
        except SessionError as error:
            raise _told(error) from error
    finally:
        reader.leave()


def _told(error: SessionError) -> Exception:
    """An error in the form in which SGLang's routes expect those of its manager."""
    status = status_of(error)
    cause = error.__cause__
    message = cause.message if isinstance(cause, EngineError) else error.message
    return ValueError(message) if status in (400, 413, 422) else HTTPException(status, message)
