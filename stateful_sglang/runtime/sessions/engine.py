"""The runtime's client side: a tokenizer manager that knows turns, and the API room's engine."""

from __future__ import annotations

import asyncio
import logging
import secrets
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.utils import TypeBasedDispatcher

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.grammar.worker import Worker
from stateful_sglang.runtime.sessions.finish import ended_badly, finish_of
from stateful_sglang.runtime.sessions.requests import (
    SessionAppendReq,
    SessionCloseReq,
    TreeSummaryReq,
    TreeSummaryReqOutput,
)
from stateful_sglang.runtime.sessions.sampling import sampling_params
from stateful_sglang.runtime.sessions.tool_calls import parse_with_sglang
from stateful_sglang.service.engine import EngineError, TurnProgress, TurnRequest
from stateful_sglang.service.tool_calls import ParsedAnswer
from stateful_sglang.session.ids import digest

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
ATTACHMENTS = (
    Attachment(
        f"{_MANAGER}._create_tokenized_object",
        "subclass",
        "a turn leaves the API process as our append request",
    ),
    Attachment(
        f"{_MANAGER}.tokenized_generate_req_type",
        "relies",
        "the type that our append request takes its fields from",
    ),
    Attachment(
        f"{_MANAGER}._dispatch_to_scheduler",
        "relies",
        "close and tree requests leave the API process as SGLang's own do",
    ),
    Attachment(
        f"{_MANAGER}.generate_request",
        "relies",
        "turns use SGLang's own path for validation, streaming, logging and metrics",
    ),
    Attachment(
        f"{_MANAGER}.abort_request",
        "relies",
        "a lost client aborts its turn; the engine waits until the scheduler let go of it",
    ),
    Attachment(
        "sglang.srt.entrypoints.engine.init_tokenizer_manager",
        "relies",
        "SGLang's launcher takes the tokenizer manager's class as an argument",
    ),
    Attachment(
        "sglang.srt.function_call.function_call_parser.FunctionCallParser.parse_non_stream",
        "relies",
        "finds the calls in what a model wrote, by the model's own parser",
    ),
    Attachment(
        "sglang.srt.entrypoints.openai.protocol.Tool",
        "relies",
        "tools as that parser takes them",
    ),
)

SPARSE_STREAM_INTERVAL = 1 << 20
"""Tokens between two progress reports of a turn that nobody streams: the first one, then the last.
SGLang reports a request at its first token whatever the interval, which dates the TTFT."""

_DISPATCH_POLL_S = 0.005
_TREE_REPLY_TIMEOUT_S = 30.0


class TurnOrigin:
    """What a turn continues. No dataclass: SGLang's request log writes out every field of one."""

    __slots__ = ("base_len", "session_id")

    def __init__(self, turn: TurnRequest) -> None:
        self.session_id = turn.session_id
        self.base_len = turn.base_len

    def __repr__(self) -> str:
        return f"TurnOrigin({digest(self.session_id)}, base_len={self.base_len})"


@dataclass
class TurnInput(GenerateReqInput):
    """A generate request that stands for one turn of a session."""

    turn: TurnOrigin | None = None


class StatefulTokenizerManager(TokenizerManager):
    """SGLang's tokenizer manager, sending turns as append requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tree_replies: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._result_dispatcher += TypeBasedDispatcher(
            [(TreeSummaryReqOutput, self._handle_tree_summary)]
        )

    def _create_tokenized_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        tokenized = super()._create_tokenized_object(obj, *args, **kwargs)
        turn = getattr(obj, "turn", None)
        if turn is None:
            return tokenized
        assert isinstance(tokenized, TokenizedGenerateReqInput)
        fields = msgspec.structs.asdict(tokenized)
        return SessionAppendReq(**fields, stateful_session=turn.session_id, base_len=turn.base_len)

    def send_session_close(self, session_id: str) -> None:
        """Tell every rank to forget a session."""
        self._dispatch_to_scheduler(SessionCloseReq(stateful_session=session_id))

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Ask the scheduler to describe its tree.

        Raises:
            TimeoutError: The scheduler did not answer; it is busy in one very long step, or gone.
        """
        self.auto_create_handle_loop()
        rid = secrets.token_hex(16)
        future = asyncio.get_running_loop().create_future()
        self._tree_replies[rid] = future
        try:
            self._dispatch_to_scheduler(
                TreeSummaryReq(rid=rid, stateful_session=session_id, limit=limit)
            )
            return await asyncio.wait_for(future, _TREE_REPLY_TIMEOUT_S)
        finally:
            del self._tree_replies[rid]

    def _handle_tree_summary(self, reply: TreeSummaryReqOutput) -> None:
        future = self._tree_replies.get(reply.rid or "")
        if future is not None and not future.done():
            future.set_result(reply.summary)


def stateful_tokenizer_manager(on_ready: Callable[[StatefulTokenizerManager], None]) -> Any:
    """SGLang's ``init_tokenizer_manager`` for our class; ``on_ready`` sees the manager it made."""
    init = partial(init_tokenizer_manager, TokenizerManagerClass=StatefulTokenizerManager)

    def build(*args: Any, **kwargs: Any) -> Any:
        manager, templates = init(*args, **kwargs)
        on_ready(manager)
        return manager, templates

    return build


class SGLangEngine:
    """:class:`~stateful_sglang.service.engine.TurnEngine` over SGLang's tokenizer manager."""

    def __init__(self, manager: StatefulTokenizerManager) -> None:
        self._manager = manager
        self.tokenizer: Any = manager.tokenizer
        self.vocab_size: int = manager.model_config.vocab_size
        self.eos_ids = _end_tokens(manager)
        self._tool_call_parser: str | None = manager.config_value("tool_call_parser")
        self._compiler: Worker | None = None
        if manager.config_value("grammar_backend") == "xgrammar":
            self._compiler = Worker("stateful_sglang.runtime.grammar_check:check")
            self._compiler.warm("regex", "a")  # While the model loads: no turn waits for it.

    @property
    def context_length(self) -> int:
        """Most tokens of a session, prompt and answer.

        The scheduler's own limit on a prompt, a few tokens short of the model's context, and of the
        KV pool where that is smaller; SGLang learns it from the scheduler at the end of its start.
        """
        limit: int = getattr(self._manager, "max_req_input_len", None) or self._manager.context_len
        return limit

    async def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        """Run a turn; see :class:`~stateful_sglang.service.engine.TurnEngine`.

        The turn's request is a task of its own, so that a reader who leaves aborts it in an orderly
        way: this generator ends only when the scheduler has let go of the request, and the session
        can take its next turn.
        """
        queue: asyncio.Queue[TurnProgress | EngineError] = asyncio.Queue()
        task = asyncio.create_task(self._pump(turn, queue))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            await asyncio.shield(self._settle(turn.rid, task))

    def parse_tool_calls(self, raw: str, tools: Sequence[Mapping[str, Any]]) -> ParsedAnswer | None:
        """Calls as the server's ``--tool-call-parser`` finds them, if it has one."""
        if self._tool_call_parser is None:
            return None
        return parse_with_sglang(raw, tools, self._tool_call_parser, self.tokenizer)

    async def check_constraint(self, kind: str, text: str) -> None:
        """Ask the grammar compiler, in a process apart; see :class:`TurnEngine`."""
        if self._compiler is not None:
            await self._compiler.run(kind, text)

    async def close_session(self, session_id: str) -> None:
        """Drop the session on every rank."""
        self._manager.send_session_close(session_id)

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Describe the tree, or one session's path in it."""
        try:
            return await self._manager.tree_summary(session_id, limit)
        except TimeoutError as error:
            raise EngineError(
                "overloaded",
                "the scheduler did not describe its tree in time: it is in one very long step, or "
                "gone. Look at /health, and ask again",
            ) from error

    async def _pump(
        self, turn: TurnRequest, queue: asyncio.Queue[TurnProgress | EngineError]
    ) -> None:
        sampling = sampling_params(turn.sampling, turn.constraint)
        if not turn.stream:
            sampling["stream_interval"] = SPARSE_STREAM_INTERVAL
        request = TurnInput(
            rid=turn.rid,
            input_ids=turn.delta.tolist(),
            sampling_params=sampling,
            stream=True,
            turn=TurnOrigin(turn),
        )
        constrained = turn.constraint is not None
        output_ids = array("q")
        over = False
        try:
            # To its end, whatever it reports: SGLang tidies up behind its last report.
            async for out in self._manager.generate_request(request, None):
                try:
                    progress = _progress(out, output_ids, constrained=constrained)
                except EngineError as error:
                    queue.put_nowait(error)
                    over = True
                else:
                    queue.put_nowait(progress)
                    over = progress.finish is not None
        except Exception as error:
            logger.exception("turn %s failed", turn.rid)
            queue.put_nowait(EngineError("broken", f"{type(error).__name__}: {error}"))
        else:
            if not over:
                ended = "SGLang ended the request without a finish reason"
                queue.put_nowait(EngineError("broken", ended))

    async def _settle(self, rid: str, task: asyncio.Task[None]) -> None:
        """Abort the request unless it ended, and wait until it did."""
        while not task.done():
            state = self._manager.rid_to_state.get(rid)
            # An abort that overtakes its request finds nothing to abort.
            if state is not None and state.dispatched:
                self._manager.abort_request(rid)
            await asyncio.wait({task}, timeout=_DISPATCH_POLL_S)


def _end_tokens(manager: StatefulTokenizerManager) -> frozenset[int]:
    """Tokens that end a generation: the model configuration's and the tokenizer's."""
    ids = set(manager.model_config.hf_eos_token_id or ())
    if manager.tokenizer is not None and manager.tokenizer.eos_token_id is not None:
        ids.add(manager.tokenizer.eos_token_id)
    return frozenset(ids)


def _progress(out: Mapping[str, Any], output_ids: array[int], *, constrained: bool) -> TurnProgress:
    """SGLang's report as ours; what it has beyond `output_ids` is appended to that array.

    Raises:
        EngineError: It reports a bad end.
    """
    if "meta_info" not in out:  # an error that SGLang reports as a stream's last message
        error = out.get("error") or {}
        message = str(error.get("message") or "aborted")
        raise ended_badly(message, error.get("code"), constrained=constrained)
    meta = out["meta_info"]
    # SGLang's list holds the whole output at each report: only its tail is new.
    output_ids.extend((out.get("output_ids") or [])[len(output_ids) :])
    # Without speculation SGLang counts no verify steps: one token a step after the prefill's.
    steps = meta.get("spec_verify_ct", max(len(output_ids) - 1, 0))
    return TurnProgress(
        text=out.get("text") or "",
        output_ids=output_ids,
        finish=finish_of(meta.get("finish_reason"), constrained=constrained),
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        decode_steps=steps,
    )
