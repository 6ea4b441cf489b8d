"""Delta rendering: from new messages to new tokens, without touching what came before.

A chat template is a function of the whole conversation, but with nearly all of them appending
messages only appends text. Whether that holds here is read off a short stand-in conversation: the
session's own head, invented messages in the shape of its history, an invented answer, then the real
new messages::

    prompt  = template(head, stand-ins,                      generation prompt)
    full    = template(head, stand-ins, answer, new messages, generation prompt)
    full    = prompt + answer + end token + delta      <- the pattern extends by a suffix

The cost is that of the head and the new messages, whatever the history. Tokenising starts at the
end token: a special token, across which no merge reaches, so the tokens equal those of the full
text. Otherwise the whole conversation is rendered, and what it shares with the transcript is kept.

What messages say stays text on the way: see `content`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stateful_sglang.rendering.content import ContentGuard, ContentTokens
from stateful_sglang.rendering.stand_ins import PROBE_ARGUMENT, PROBE_CALL, stand_in, stand_ins
from stateful_sglang.rendering.templates import (
    ChatTemplate,
    ChatTokenizer,
    TemplateRefusedError,
)
from stateful_sglang.session.conversation import (
    RAW_SHAPE,
    Conversation,
    Shape,
)
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.transcript import Transcript

_ANSWER = "zqanswer"
_PROMPTS_KEPT = 128
_HEADS_KEPT = 128


@dataclass(frozen=True)
class RenderedDelta:
    """What a turn adds to a transcript."""

    base_len: int
    """Transcript tokens kept; fewer than there are where the template rewrites them."""
    delta: array[int]
    """New tokens, typecode 'q'."""
    rewind_reason: str | None = None
    """Why tokens were not kept: `template_rewrites_history` or `end_token`."""


def beyond(transcript: Transcript, ids: array[int]) -> RenderedDelta:
    """What a whole rendering ('q') adds to a transcript: what the two share is kept."""
    # At least one token must be computed, for its logits.
    kept = min(transcript.common_prefix(ids), len(ids) - 1)
    reason = "template_rewrites_history" if kept < len(transcript) else None
    return RenderedDelta(kept, ids[kept:], reason)


@dataclass(frozen=True)
class _Ending:
    """What follows an answer in the template's text."""

    end_text: str
    rest: str


class DeltaRenderer:
    """Renders the turns of all sessions of one model. Holds a bounded cache, no session state."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        end_ids: Iterable[int],
        content_tokens: ContentTokens = "text",
    ) -> None:
        """
        Args:
            tokenizer: A Hugging Face tokenizer.
            end_ids: Tokens that end a generation.
            content_tokens: What special tokens spelled in content become.
        """
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._guard = ContentGuard(tokenizer, content_tokens)
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._end_ids = frozenset(end_ids)
        texts = (tokenizer.decode([token], skip_special_tokens=False) for token in self._end_ids)
        self._end_texts = sorted({text for text in texts if text}, key=len, reverse=True)
        self._prompts: OrderedDict[tuple[str, Shape], str] = OrderedDict()

    def check_head(self, head: Head) -> None:
        """Raise `TemplateRefusedError` where the template can't render this head at all."""
        self._render(head, [Message("user", "zq")])

    def first(self, head: Head, messages: Sequence[Message]) -> RenderedDelta:
        """Tokens of a session's first turn: the whole conversation and the generation prompt."""
        text = self._render(head, self._guard.messages(messages))
        return RenderedDelta(0, array("q", self._guard.encode(text)))

    def is_plain(self, head: Head, messages: Sequence[Message]) -> bool:
        """Whether no content spells what could become a special token: whoever else renders these
        messages by the model's template comes to the same tokens."""
        return self._guard.lets_through(head, messages)

    def text(self, text: str, transcript: Transcript) -> RenderedDelta:
        """Tokens of raw text, in which special tokens are meant as such; the tokenizer's own start
        tokens only at the very beginning."""
        ids = self._tokenizer.encode(text, add_special_tokens=not len(transcript))
        return RenderedDelta(len(transcript), array("q", ids))

    def next(
        self, conversation: Conversation, transcript: Transcript, new: Sequence[Message]
    ) -> RenderedDelta:
        """Tokens of a later turn: the rest of the last answer's ending, the new messages and the
        generation prompt. Changes neither argument.

        Raises:
            TemplateRefusedError: The template raised on the new messages.
            InvalidInputError: The template rewrites history, and the history is not all messages.
        """
        new = self._guard.messages(new)
        try:
            ending = self._ending(conversation, new)
        except TemplateRefusedError:
            if conversation.raw:
                raise
            ending = None  # the template may mind the stand-ins alone
        ids = self._guard.encode(ending.end_text + ending.rest) if ending else []
        if ids and ids[0] in self._end_ids and len(transcript):
            last = transcript.last()
            if last == ids[0]:
                return RenderedDelta(len(transcript), array("q", ids[1:]))
            if last in self._end_ids:
                # Ended by another end token than the template's own: that one takes its place.
                return RenderedDelta(len(transcript) - 1, array("q", ids), "end_token")
            return RenderedDelta(len(transcript), array("q", ids))
        if conversation.raw:
            raise InvalidInputError(
                "messages",
                "this model's chat template rewrites earlier turns, so messages can't follow text "
                "or input_ids in one session; open another session",
            )
        return self._common_prefix(conversation, transcript, new)

    def answer_text(self, output_ids: Sequence[int]) -> str:
        """The text of a generated answer, special tokens included, without its end token."""
        ids = list(output_ids)
        if ids and ids[-1] in self._end_ids:
            ids.pop()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def answer_tokens(self, output_ids: Sequence[int], text: str) -> frozenset[str]:
        """Which spellings in an answer's `text` are special or added tokens, not text like them."""
        return self._guard.tokens_in(output_ids, text)

    def prepare(self) -> None:
        """Do once, before requests come, what the first of them would wait for."""
        self._guard.prepare()

    # Messages below are as the guard lets the template see them.

    def _common_prefix(
        self, conversation: Conversation, transcript: Transcript, new: Sequence[Message]
    ) -> RenderedDelta:
        old = self._guard.messages(conversation.messages)
        ids = self._guard.encode(self._render(conversation.head, [*old, *new]))
        return beyond(transcript, array("q", ids))

    def _ending(self, conversation: Conversation, new: Sequence[Message]) -> _Ending | None:
        """What the template puts after the last answer, or None where appending is not enough."""
        head = conversation.head
        shape = RAW_SHAPE if conversation.raw or not conversation.shape else conversation.shape
        before, kind = shape[:-1], shape[-1][-1]
        if not before or not kind.startswith("assistant"):
            return None
        answer = replace(stand_in(kind, _ANSWER), tool_calls=())
        if "calls" in kind and self._template.knows_tool_messages:
            # Results in `new` answer the real calls, by number and by id.
            (last,) = self._guard.messages(conversation.messages[-1:])
            calls = last.tool_calls
            answer = replace(
                answer, tool_calls=tuple(replace(PROBE_CALL, id=c.id, name=c.name) for c in calls)
            )
        full = self._render(head, [*stand_ins(before), answer, *new])
        prompt = self._prompt(head, before)
        if not full.startswith(prompt):
            # The cached prompt may hold yesterday's date.
            prompt = self._prompt(head, before, refresh=True)
            if not full.startswith(prompt):
                return None
        said = full.find(answer.content, len(prompt))
        if said >= 0 and full[len(prompt) : said].strip():
            return None  # the template put words before the answer that the prompt lacks
        # Templates write calls in ways of their own: their end is the next end token.
        word = PROBE_ARGUMENT if answer.tool_calls else answer.content
        at = full.find(word, len(prompt))
        if at < 0:
            return None
        return self._ending_from(full, at + len(word), immediate=not answer.tool_calls)

    def _ending_from(self, full: str, start: int, *, immediate: bool) -> _Ending | None:
        """The first end token at or after `start`; with `immediate`, behind whitespace at most."""
        found = [(full.find(text, start), text) for text in self._end_texts]
        found = [(at, text) for at, text in found if at >= 0]
        if not found:
            return None
        at, text = min(found, key=lambda each: (each[0], -len(each[1])))
        if immediate and full[start:at].strip():
            return None
        return _Ending(text, full[at + len(text) :])

    def _prompt(self, head: Head, shape: Shape, *, refresh: bool = False) -> str:
        key = (head.key, shape)
        cached = None if refresh else self._prompts.get(key)
        if cached is None:
            cached = self._render(head, stand_ins(shape))
            self._prompts[key] = cached
            if len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return cached

    def _render(self, head: Head, messages: Sequence[Message]) -> str:
        return self._template.render(
            self._guarded(head),
            messages,
            generation_prompt=True,
            native=head.verbatim or self._template.knows_tool_messages,
        )

    def _guarded(self, head: Head) -> Head:
        try:
            guarded = self._heads.get(head.key)
            if guarded is None:
                guarded = self._heads[head.key] = self._guard.head(head)
        except RecursionError as error:
            raise InvalidInputError(
                "tools", "tools or chat_template_kwargs are nested too deep"
            ) from error
        if len(self._heads) > _HEADS_KEPT:
            self._heads.popitem(last=False)
        self._heads.move_to_end(head.key)
        return guarded
