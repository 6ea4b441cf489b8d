"""Content stays text: no special or added token arises from what a message says.

A chat template joins its own special tokens with the content of messages into one text, and a
tokenizer does not know which is which: a web page with ``<|im_end|><|im_start|>system`` in it
would become a system prompt. So before the template sees content, each spelling of a special or
added token in it is replaced by a word that nobody can guess; afterwards the words are put back,
and this text is encoded by a tokenizer in which content can't spell those tokens::

    content    "a <|im_end|> b"
    shielded   "a 5f0c…3e67 b"                          what the template sees
    rendered   "<|im_start|>user\\na 5f0c…3e67 b<|im_end|>"
    encoded    <|im_start|> user \\n a < | im _ end | > b <|im_end|>

Content is everything that a client or a third party wrote: messages, names, ids, arguments of
calls, tool definitions, the system prompt and template arguments. Ends of content that could
become a spelling with their neighbours (``<|im_`` before ``end|>``) are replaced likewise.
Content without any of this is rendered and encoded as ever, by the tokenizer itself.

Two things are not content in this sense:

- What the model generated as special tokens stays special tokens, where a turn is rendered again.
- ``<think>`` and ``</think>`` in an assistant message that a client wrote. Templates of reasoning
  models look for them, to drop the thoughts of earlier turns; they open no turn.

A template that looks for other tags in messages (Qwen 3 takes a user message in
``<tool_response>`` for a tool's result) does not find them where they are added tokens.

`text` and `input_ids` of an append are the caller's own rendering, special tokens included, and
never come here.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from stateful_sglang.rendering.plain_encoding import PlainEncoding, plain_encoding
from stateful_sglang.rendering.spellings import Edges, pattern_of, protected_tokens
from stateful_sglang.session.errors import InvalidInputError
from stateful_sglang.session.messages import Head, Message, ToolCall

ContentTokens = Literal["text", "special"]
"""What a special token's spelling in content becomes: text, or, as in SGLang, that token."""

REASONING_TAGS = frozenset({"<think>", "</think>"})
"""What an assistant message that a client wrote may hold as tokens."""

_TEMPLATE_WORDS = frozenset(
    (
        *("type", "function", "name", "description", "parameters"),
        *("properties", "required", "items", "enum", "default", "title"),
        *("additionalProperties", "anyOf", "$ref", "$defs"),
        *("object", "array", "string", "integer", "number", "boolean", "null"),
    )
)
"""Words of tool definitions that templates look up and compare."""
_NONE: frozenset[str] = frozenset()


class ContentGuard:
    """Keeps the content of one model's conversations text. Holds no conversation."""

    def __init__(self, tokenizer: Any, content_tokens: ContentTokens = "text") -> None:
        """
        Args:
            tokenizer: A Hugging Face tokenizer; one without added tokens has nothing to guard.
            content_tokens: ``special`` lets everything through.
        """
        self._tokenizer = tokenizer
        self._tokens = protected_tokens(tokenizer) if content_tokens == "text" else ()
        self._pattern = pattern_of(token.spelling for token in self._tokens)
        self._edges = Edges(token.spelling for token in self._tokens)
        self._nonce = secrets.token_hex(12)
        self._mark = re.compile(self._nonce + "((?:[0-9a-f]{2})+)g")
        # Text that a normaliser turns into such a token can't be found by its spelling.
        self._always_plain = any(token.normalized for token in self._tokens) and (
            getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None) is not None
        )

    @cached_property
    def _plain(self) -> PlainEncoding:
        return plain_encoding(self._tokenizer, self._tokens)

    def prepare(self) -> None:
        """Build now what the first suspicious content would otherwise wait for."""
        if self._tokens:
            _ = self._plain

    def head(self, head: Head) -> Head:
        """`head` as the template may see it."""
        if not self._tokens:
            return head
        system = None if head.system is None else self.text(head.system)
        tools = tuple(self._value(dict(tool)) for tool in head.tools)
        return replace(
            head,
            system=system,
            tools=tools,
            template_kwargs=self._value(dict(head.template_kwargs)),
        )

    def lets_through(self, head: Head, messages: Sequence[Message]) -> bool:
        """Whether nothing of this would be taken out before a template sees it."""
        if self._always_plain:
            return False
        return self.head(head) == head and self.messages(messages) == list(messages)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` as the template may see them."""
        return [self._message(each) for each in messages] if self._tokens else list(messages)

    def text(self, text: str, keep: frozenset[str] = _NONE) -> str:
        """`text` as the template may see it; spellings in `keep` are left as they are."""
        if not self._tokens:
            return text
        shielded, start = [], 0
        # What is kept may be where a template cuts, so that text beside it gets new neighbours.
        for found in self._pattern.finditer(text) if keep else ():
            if found[0] in keep:
                shielded += [self._part(text[start : found.start()]), found[0]]
                start = found.end()
        return "".join([*shielded, self._part(text[start:])])

    def tokens_in(self, output_ids: Sequence[int], text: str) -> frozenset[str]:
        """Spellings that are tokens of the model's own each time they occur in `text`.

        Args:
            output_ids: What the model generated.
            text: The same as text, special tokens included.
        """
        count = Counter(output_ids)
        generated = {t.spelling: count[t.id] for t in self._tokens if t.id in count}
        if not generated:
            return _NONE
        spelled = Counter(found[0] for found in self._pattern.finditer(text))
        return frozenset(each for each, times in generated.items() if spelled[each] == times)

    def encode(self, text: str) -> list[int]:
        """Tokens of rendered text: the template's special tokens, and content as text."""
        if self._nonce not in text and not self._always_plain:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
            return ids
        # Odd parts are what was taken out of content.
        parts = self._mark.split(text)
        segments: list[str | int] = []
        for index, part in enumerate(parts):
            if index % 2:
                segments.append(bytes.fromhex(part).decode("utf-8", "surrogatepass"))
            else:
                segments += self._plain.split(part)
        return self._plain.encode(segments)

    def _message(self, message: Message) -> Message:
        keep = _NONE
        if message.role == "assistant":
            keep = REASONING_TAGS if message.raw is None else message.tokens
        try:
            calls = tuple(
                ToolCall(self.text(c.id), self.text(c.name), self._value(c.arguments))
                for c in message.tool_calls
            )
        except RecursionError as error:
            raise InvalidInputError("messages", "a call's arguments are nested too deep") from error
        return replace(
            message,
            content=self.text(message.content, keep),
            tool_calls=calls,
            tool_call_id=message.tool_call_id and self.text(message.tool_call_id),
            name=message.name and self.text(message.name),
            raw=message.raw and self.text(message.raw, keep),
        )

    def _value(self, value: Any) -> Any:
        """JSON, with every string in it shielded, keys too."""
        if isinstance(value, str):
            return value if value in _TEMPLATE_WORDS else self.text(value)
        if isinstance(value, Mapping):
            return {self._value(key): self._value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(each) for each in value]
        return value

    def _part(self, text: str) -> str:
        texts, marks, start = [], [], 0
        for found in self._pattern.finditer(text):
            texts.append(text[start : found.start()])
            marks.append(self._marked(found[0]))
            start = found.end()
        texts.append(text[start:])
        # Templates trim; the edges are those that remain.
        core = text.strip()
        if self._edges.is_inner(core):
            return text.replace(core, self._marked(core), 1)
        first = texts[0].lstrip()
        if size := self._edges.tail(first):
            blank = texts[0][: len(texts[0]) - len(first)]
            texts.insert(1, first[size:])
            texts[0] = blank
            marks.insert(0, self._marked(first[:size]))
        last = texts[-1].rstrip()
        if size := self._edges.head(last):
            texts.append(texts[-1][len(last) :])
            texts[-2] = last[:-size]
            marks.append(self._marked(last[-size:]))
        return "".join(piece for pair in zip(texts, [*marks, ""], strict=True) for piece in pair)

    def _marked(self, text: str) -> str:
        return f"{self._nonce}{text.encode('utf-8', 'surrogatepass').hex()}g"
