"""The engine port over SGLang's tokenizer manager."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from stateful_sglang import tenants
from stateful_sglang.attachments.check import Attachment
from stateful_sglang.grammar.worker import Worker
from stateful_sglang.runtime.options import Options
from stateful_sglang.runtime.sessions import manager
from stateful_sglang.runtime.sessions.finish import ended_badly, finish_of
from stateful_sglang.runtime.sessions.identity import model_digest
from stateful_sglang.runtime.sessions.manager import (
    StatefulTokenizerManager,
    TurnInput,
    TurnOrigin,
)
from stateful_sglang.runtime.sessions.sampling import sampling_params
from stateful_sglang.runtime.sessions.tool_calls import parse_with_sglang
from stateful_sglang.service.engine import (
    EngineError,
    Finish,
    PublishAnswer,
    TurnProgress,
    TurnRequest,
)
from stateful_sglang.service.tool_calls import ParsedAnswer
from stateful_sglang.session.ids import new_rid

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
ATTACHMENTS = (
    *manager.ATTACHMENTS,
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
        "sglang.srt.managers.schedule_batch.Req.update_finish_state",
        "relies",
        "a request of no new tokens ends by length at its prefill's end, whatever was sampled",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        "relies",
        "what a request is told that is given up for lack of KV: such a turn can run again",
    ),
    Attachment(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        "relies",
        "a prompt that the whole pool can't hold is a bad request, and no lack of memory",
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

_NOTHING: Mapping[str, Any] = {"max_new_tokens": 0, "temperature": 0.0}
"""Sampling of a turn that generates nothing. SGLang computes the KV of the whole prompt, samples
nothing (or a token that it drops, where the server drafts), and ends the request by length."""
_WIRE_FIELDS = tuple(each.name for each in fields(GenerateReqInput) if each.init)
_DISPATCH_POLL_S = 0.005
_LATE = "it is in one very long step, or gone. Look at /health, and ask again"


class SGLangEngine:
    """:class:`~stateful_sglang.service.engine.TurnEngine` over SGLang's tokenizer manager."""

    def __init__(self, manager: StatefulTokenizerManager) -> None:
        self._manager = manager
        self.tokenizer: Any = manager.tokenizer
        self.vocab_size: int = manager.model_config.vocab_size
        self.eos_ids = _end_tokens(manager)
        options = Options.from_env()
        self.model_digest = model_digest(
            manager.model_config,
            manager.tokenizer,
            manager.config_value("tokenizer_path"),
            manager.config_value("revision"),
            cpu_quant="int8" if options is not None and options.cpu_quant == "int8" else None,
        )
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

    async def fork_session(self, source_id: str, session_id: str, length: int) -> None:
        """Let a new session share another's first tokens on every rank."""
        self._manager.send_session_fork(source_id, session_id, length)

    async def rollback_session(self, session_id: str, length: int) -> None:
        """Drop the session's tokens beyond a length on every rank."""
        self._manager.send_session_rollback(session_id, length)

    async def close_session(self, session_id: str) -> None:
        """Drop the session on every rank."""
        self._manager.send_session_close(session_id)

    async def publish_prefix(
        self, prefix_id: str, tokens: array[int], *, compute: bool
    ) -> PublishAnswer:
        """Share a prefix on every rank; see :class:`TurnEngine`."""
        try:
            reply = await self._manager.publish(prefix_id, tokens.tolist())
            if compute and reply.problem is None:
                with tenants.acting_as(tenants.SERVER):  # which has no salt
                    await self._compute(tokens)
        except BaseException as error:
            self._manager.send_unpublish(prefix_id)
            if isinstance(error, TimeoutError):
                raise EngineError(
                    "overloaded", f"the scheduler did not publish it in time: {_LATE}"
                ) from error
            raise
        return PublishAnswer(reply.aligned_tokens, reply.problem)

    async def unpublish_prefix(self, prefix_id: str) -> None:
        """Share a prefix no longer, on any rank."""
        self._manager.send_unpublish(prefix_id)

    async def _compute(self, tokens: array[int]) -> None:
        """Prefill these tokens alone, so that their KV is in the tree.

        Raises:
            EngineError: It was not done.
        """
        request = GenerateReqInput(
            rid=new_rid(), input_ids=tokens.tolist(), sampling_params=dict(_NOTHING), stream=True
        )
        finish: Finish | None = None
        try:
            async for out in self._manager.generate_request(request, None):
                finish = _progress(out, array("q"), constrained=False).finish
        except ValueError as error:  # what SGLang says of a request that it can't take
            raise EngineError("invalid", str(error)) from error
        if finish is None:
            raise EngineError("broken", "SGLang ended the request without a finish reason")

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Describe the tree, or one session's path in it."""
        try:
            return await self._manager.tree_summary(session_id, limit)
        except TimeoutError as error:
            raise EngineError(
                "overloaded",
                f"the scheduler did not describe its tree in time: {_LATE}",
            ) from error

    async def _pump(
        self, turn: TurnRequest, queue: asyncio.Queue[TurnProgress | EngineError]
    ) -> None:
        generates = turn.kind != "prefill"
        if turn.wire is not None:
            sampling = dict(turn.wire.sampling_params)
        elif generates:
            sampling = sampling_params(turn.sampling, turn.constraint)
        else:
            sampling = dict(_NOTHING)
        if generates and not turn.stream:
            sampling["stream_interval"] = SPARSE_STREAM_INTERVAL
        request = _request(turn, sampling)
        constrained = generates and turn.constraint is not None
        output_ids = array("q")
        over = False
        try:
            # To its end, whatever it reports: SGLang tidies up behind its last report.
            async for out in self._manager.generate_request(request, None):
                try:
                    progress = _progress(out, output_ids, constrained=constrained)
                    if turn.wire is not None:
                        progress = progress._replace(report=out)
                except EngineError as error:
                    queue.put_nowait(error)
                    over = True
                else:
                    if generates:
                        queue.put_nowait(progress)
                    elif progress.finish is not None:
                        queue.put_nowait(_prefilled(progress))
                    over = progress.finish is not None
        except ValueError as error:  # what SGLang says of a request that it can't take
            queue.put_nowait(EngineError("invalid", str(error)))
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


def _request(turn: TurnRequest, sampling: dict[str, Any]) -> TurnInput:
    """The turn as SGLang takes it; of one that came in SGLang's form, all but its prompt."""
    wire = turn.wire
    values = {} if wire is None else {name: getattr(wire, name) for name in _WIRE_FIELDS}
    own = {
        "rid": turn.rid,
        "text": None,
        "input_ids": turn.delta.tolist(),
        "sampling_params": sampling,
        "stream": True,
    }
    return TurnInput(**(values | own), turn=TurnOrigin(turn))


def _prefilled(progress: TurnProgress) -> TurnProgress:
    """The end of a turn that was not to generate anything, whatever was sampled."""
    return progress._replace(
        text="", output_ids=array("q"), finish=Finish("length"), decode_steps=0
    )


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
