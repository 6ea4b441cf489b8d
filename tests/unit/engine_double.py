"""A double of the model server, for tests of sessions only: it writes letters, not language.

Its answer is a function of the whole prompt, so two sessions answer alike exactly when their
transcripts are alike. It keeps tokens in the real `RankSessions`, so that what the API sends must
fit what a rank holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from array import array
from collections.abc import AsyncIterator, Mapping
from typing import Any

import jinja2
from tokenizers import AddedToken

from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.runtime.sessions.finish import finish_of
from stateful_sglang.service.engine import (
    EngineError,
    Finish,
    PublishAnswer,
    TurnProgress,
    TurnRequest,
)
from stateful_sglang.session.rank import RankSessions, StaleBaseError, TurnRefusedError

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
FORGETFUL = "{%- set messages = messages[-1:] -%}" + CHATML
"""A template that renders only the last message: no pattern of it extends by a suffix."""
END = 2


class CharTokenizer:
    """One token a character, and two special ones."""

    specials: Mapping[str, int] = {"<|im_start|>": 1, "<|im_end|>": END}
    first = 3

    def __init__(self, template: str = CHATML) -> None:
        environment = jinja2.Environment()
        environment.globals["raise_exception"] = self._raise
        self._template = environment.from_string(template)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {token: AddedToken(text, special=True) for text, token in self.specials.items()}

    @staticmethod
    def _raise(message: str) -> None:
        raise jinja2.TemplateError(message)

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, **kwargs: Any) -> str:
        assert not tokenize
        conversation[0]  # Hugging Face's tokenizers look at it, so that none raises IndexError
        return self._template.render(messages=conversation, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text)
        ids: list[int] = []
        for part in parts:
            special = self.specials.get(part)
            ids += [special] if special else [ord(char) + self.first for char in part]
        return ids

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        names = {token: text for text, token in self.specials.items()}
        if skip_special_tokens:
            names = dict.fromkeys(names, "")
        return "".join(names.get(each) or self._char(each, names) for each in token_ids)

    def _char(self, token: int, names: Mapping[int, str]) -> str:
        return "" if token in names else chr(token - self.first)


class EngineDouble:
    """Deterministic answers a token at a time, with handles to stop, break and script them."""

    def __init__(self, context_length: int = 4096, template: str = CHATML) -> None:
        self.context_length = context_length
        self.model_digest = hashlib.sha256(template.encode()).hexdigest()[:16]
        self.vocab_size = 1200
        self.tokenizer = CharTokenizer(template)
        self.eos_ids = frozenset({END})
        self.rank = RankSessions()
        self.requests: list[TurnRequest] = []
        self.prompts: list[list[int]] = []
        self.aborted: list[str] = []
        self.closed: list[str] = []
        self.forked: list[tuple[str, str, int]] = []
        self.rolled_back: list[tuple[str, int]] = []
        self.script: str | None = None
        """Text of the next answers, in place of letters."""
        self.pause_after: int | None = None
        """Tokens after which a turn waits for `go`."""
        self.paused, self.go = asyncio.Event(), asyncio.Event()
        self.published: dict[str, list[int]] = {}
        self.computed: list[str] = []
        """Of those, the ones whose KV was asked for with them."""
        self.refuse_prefixes: str | None = None
        """Why a rank publishes nothing; None where it does."""
        self.constraints: list[tuple[str, str]] = []
        self.refuse_constraints: str | None = None
        """What a compiler says of every constraint; None where it takes them."""
        self.linger: asyncio.Event | None = None
        """Awaited after the last token was given, before the turn is over."""
        self.silent = False
        """Whether questions about the tree go unanswered."""
        self.end_with: Mapping[str, Any] | Exception | None = None
        """In place of a good finish; a mapping is one of SGLang's, read by the real adapter."""

    async def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        self.requests.append(turn)
        try:
            prompt = self.rank.begin_turn(
                turn.session_id, turn.rid, turn.base_len, turn.delta, turn.kind
            )
        except TurnRefusedError as error:
            raise EngineError(
                "busy" if error.kind == "busy" else "stale_base", str(error)
            ) from error
        self.prompts.append(prompt.tolist())
        ended = False
        try:
            if turn.kind == "prefill":
                progress = await self._prefill(turn, len(prompt))
                ended = True
                yield progress
                return
            output = self._output(prompt, turn.sampling.max_tokens or 0)
            for count in range(1, len(output) + 1):
                if count - 1 == self.pause_after:
                    self.paused.set()
                    await self.go.wait()
                await asyncio.sleep(0)
                last = count == len(output)
                if last and isinstance(self.end_with, Exception):
                    raise self.end_with
                finish = self._finish(turn, output) if last else None
                if finish is not None:
                    self.rank.finish_turn(turn.rid, output)
                    ended = True
                yield self._progress(turn, output[:count], len(prompt), finish)
            if self.linger is not None:
                self.paused.set()
                await self.linger.wait()
        finally:
            if not ended:
                await asyncio.sleep(0)
                self.rank.finish_turn(turn.rid, None)
                self.aborted.append(turn.rid)

    def parse_tool_calls(self, raw: str, tools: Any) -> None:
        return None

    async def check_constraint(self, kind: str, text: str) -> None:
        self.constraints.append((kind, text))
        if self.refuse_constraints is not None:
            raise ConstraintError(self.refuse_constraints)

    async def fork_session(self, source_id: str, session_id: str, length: int) -> None:
        self.forked.append((source_id, session_id, length))
        with contextlib.suppress(StaleBaseError):  # said at the new session's first turn
            self.rank.fork(source_id, session_id, length)

    async def rollback_session(self, session_id: str, length: int) -> None:
        self.rolled_back.append((session_id, length))
        self.rank.rollback(session_id, length)

    async def close_session(self, session_id: str) -> None:
        self.rank.close(session_id)
        self.closed.append(session_id)

    async def publish_prefix(
        self, prefix_id: str, tokens: array[int], *, compute: bool
    ) -> PublishAnswer:
        if self.silent:
            raise EngineError("overloaded", "no answer in time; look at /health, and ask again")
        if self.refuse_prefixes is None:
            self.published[prefix_id] = tokens.tolist()
            if compute:
                self.computed.append(prefix_id)
        return PublishAnswer(len(tokens) // 16 * 16, self.refuse_prefixes)

    async def unpublish_prefix(self, prefix_id: str) -> None:
        del self.published[prefix_id]

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        if self.silent:
            raise EngineError("overloaded", "no answer in time; look at /health, and ask again")
        return {"session_id": session_id, "limit": limit, "nodes": []}

    def answer_to(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What the double generates after `prompt`."""
        return list(self._output(array("q", prompt), max_tokens))

    async def _prefill(self, turn: TurnRequest, prompt: int) -> TurnProgress:
        if self.pause_after is not None:
            self.paused.set()
            await self.go.wait()
        await asyncio.sleep(0)
        if isinstance(self.end_with, Exception):
            raise self.end_with
        finish = Finish("length")
        if isinstance(self.end_with, Mapping):
            finish = finish_of(self.end_with, constrained=False) or finish
        self.rank.finish_turn(turn.rid, ())
        return self._progress(turn, array("q"), prompt, finish)

    def _output(self, prompt: array[int], max_tokens: int) -> array[int]:
        text = self.script
        if text is None:
            digest = hashlib.sha256(prompt.tobytes()).hexdigest()
            text = digest[: 1 + int(digest[0], 16)]
        ids = self.tokenizer.encode(text)
        return array("q", [*ids, END][:max_tokens])

    def _finish(self, turn: TurnRequest, output: array[int]) -> Finish | None:
        if isinstance(self.end_with, Mapping):
            return finish_of(self.end_with, constrained=turn.constraint is not None)
        return Finish("stop", END) if output[-1] == END else Finish("length")

    def _progress(
        self, turn: TurnRequest, ids: array[int], prompt: int, finish: Finish | None
    ) -> TurnProgress:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return TurnProgress(
            text, array("q", ids), finish, prompt, turn.base_len, max(len(ids) - 1, 0)
        )
