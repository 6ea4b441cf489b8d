"""A scheduler rank with sessions: what our requests do there, and where a turn ends.

The rank's state is one :class:`SchedulerSessions` held by the scheduler. A turn begins when its
append request arrives and ends where SGLang lets go of the request: with the output that carries
its finish reason, or with the abort message for one that never ran.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.utils import TypeBasedDispatcher

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.runtime.sessions.requests import (
    PrefixPublishReq,
    PrefixPublishReqOutput,
    PrefixUnpublishReq,
    SessionAppendReq,
    SessionCloseReq,
    SessionForkReq,
    SessionRollbackReq,
    TreeSummaryReq,
    TreeSummaryReqOutput,
)
from stateful_sglang.runtime.tree.ends import ended_well, logits_broke
from stateful_sglang.session.ids import digest
from stateful_sglang.session.rank import (
    RankSessions,
    RankTurn,
    StaleBaseError,
    TurnRefusedError,
)

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
ATTACHMENTS = (
    Attachment(
        f"{_SCHEDULER}.Scheduler.init_request_dispatcher",
        "hook",
        "append, fork, rollback, close, publish and tree requests reach the rank's sessions",
    ),
    Attachment(
        f"{_SCHEDULER}.Scheduler.handle_generate_request",
        "relies",
        "an append becomes an ordinary request once its history is put before the delta",
    ),
    Attachment(
        f"{_SCHEDULER}.Scheduler._handle_generate_request",
        "relies",
        "what becomes of that request: its checks, its aborts, its place in the queue",
    ),
    Attachment(
        f"{_SCHEDULER}.Scheduler._create_generation_req",
        "relies",
        "the request object keeps the rid by which its turn is found",
    ),
    Attachment(
        f"{_STREAMER}.stream_output",
        "hook",
        "the output with the finish reason ends a turn: KV and tree are settled by then",
    ),
    Attachment(
        f"{_SCHEDULER}._make_abort_req",
        "hook",
        "the only message that ends a request which never reached the output streamer",
    ),
    Attachment(
        "sglang.utils.TypeBasedDispatcher",
        "relies",
        "our requests are added to SGLang's dispatcher",
    ),
    Attachment(
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        "registry",
        "every hook of ours is registered by it",
    ),
)


class SchedulerSessions:
    """The sessions of one rank, bound to its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.ranks = RankSessions()
        self._tree = scheduler.tree_cache
        self._tree.bind_sessions(self.ranks.turn_of)
        self._indexes = getattr(scheduler.draft_worker, "indexes", None)
        if self._indexes is not None:
            self._indexes.bind_sessions(self.ranks.turn_of)

    def append(self, request: SessionAppendReq) -> None:
        """Put the session's history before the delta and hand the request to SGLang."""
        assert request.input_ids is not None
        try:
            request.input_ids = self.ranks.begin_turn(
                request.stateful_session,
                request.rid,
                request.base_len,
                request.input_ids,
                request.kind,
            )
        except TurnRefusedError as error:
            self._reject(request, error)
            return
        self._scheduler.handle_generate_request(request)

    def fork(self, request: SessionForkReq) -> None:
        """Let a new session share another's first tokens, and their KV as far as it's there."""
        source_id, session_id, length = (
            request.source_session,
            request.stateful_session,
            request.length,
        )
        try:
            self.ranks.fork(source_id, session_id, length)
        except (StaleBaseError, ValueError) as error:
            # Said at the new session's first turn, where somebody hears it.
            logger.debug("session %s was not forked: %s", digest(session_id), error)
            return
        self._tree.fork_session(source_id, session_id, length)

    def roll_back(self, request: SessionRollbackReq) -> None:
        """Drop the session's tokens beyond a length; their KV and drafts are superseded."""
        session_id, length = request.stateful_session, request.length
        self.ranks.rollback(session_id, length)
        self._tree.truncate_session(session_id, length)
        if self._indexes is not None:
            self._indexes.truncate(session_id, length)

    def close(self, request: SessionCloseReq) -> None:
        """Forget the session's tokens, its place in the tree and its draft index."""
        session_id = request.stateful_session
        self.ranks.close(session_id)
        self._tree.release_session_leaf(session_id)
        if self._indexes is not None:
            self._indexes.close(session_id)

    def publish(self, request: PrefixPublishReq) -> PrefixPublishReqOutput:
        """Share a prefix among requests of all salts, if there is room for it."""
        aligned, problem = self._tree.publish(request.prefix_id, request.tokens)
        return PrefixPublishReqOutput(rid=request.rid, aligned_tokens=aligned, problem=problem)

    def unpublish(self, request: PrefixUnpublishReq) -> None:
        """Share a prefix no longer."""
        self._tree.unpublish(request.prefix_id)

    def summarise(self, request: TreeSummaryReq) -> TreeSummaryReqOutput:
        """Describe the tree, or one session's path in it."""
        if request.stateful_session is None:
            summary = self._tree.summary(request.limit)
        else:
            path = self._tree.session_path(request.stateful_session, request.limit)
            truncated = bool(path) and path[0].depth > path[0].tokens
            summary = {"path": [node._asdict() for node in path], "truncated": truncated}
        return TreeSummaryReqOutput(rid=request.rid, summary=summary)

    def end(self, req: Req) -> RankTurn | None:
        """End the request's turn: keep what its kind keeps, unless it was aborted."""
        turn = self.ranks.turn_of(req.rid)
        if turn is None:
            return None
        output = delivered_output(req) if ended_well(req) else None
        if output is None or turn.kind == "ephemeral":
            self._tree.bury_turn(req)
        if turn.kind == "ephemeral" and self._indexes is not None:
            self._indexes.forget(req.rid)
        return self.ranks.finish_turn(req.rid, output)

    def tell_failure(self, req: Req) -> None:
        """Make logits that were not numbers, which SGLang calls a stop, an error of the turn."""
        if self.ranks.turn_of(req.rid) is not None and logits_broke(req):
            req.finished_reason = FINISH_ABORT(
                "the model's logits were not numbers", HTTPStatus.INTERNAL_SERVER_ERROR, "broken"
            )

    def _reject(self, request: SessionAppendReq, error: TurnRefusedError) -> None:
        logger.warning("turn rejected: %s", error)
        req = Req(
            request.rid,
            None,
            request.input_ids,
            request.sampling_params,
            stream=request.stream,
            vocab_size=self._scheduler.model_config.vocab_size,
            http_worker_ipc=request.http_worker_ipc,
            time_stats=request.time_stats,
        )
        req.tokenizer = self._scheduler.tokenizer
        req.finished_reason = FINISH_ABORT(str(error), HTTPStatus.CONFLICT, error.kind)
        self._scheduler.output_streamer.stream_output([req], False)


def delivered_output(req: Req) -> list[int]:
    """Output tokens cut at what the client was given: speculation can overshoot the stop."""
    return list(req.output_ids_through_stop)


def attach() -> None:
    """Register the scheduler's hooks; SGLang applies them when all plugins have run."""
    HookRegistry.register(
        f"{_SCHEDULER}.Scheduler.init_request_dispatcher", _add_requests, HookType.AFTER
    )
    HookRegistry.register(f"{_STREAMER}.stream_output", _end_finished, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}._make_abort_req", _end_aborted, HookType.AFTER)


_bound: SchedulerSessions | None = None
"""One scheduler lives in a process; SGLang's hooks are functions and can't carry it."""


def _add_requests(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    global _bound
    _bound = sessions = SchedulerSessions(scheduler)
    scheduler._request_dispatcher += TypeBasedDispatcher(
        [
            (SessionAppendReq, sessions.append),
            (SessionForkReq, sessions.fork),
            (SessionRollbackReq, sessions.roll_back),
            (SessionCloseReq, sessions.close),
            (PrefixPublishReq, sessions.publish),
            (PrefixUnpublishReq, sessions.unpublish),
            (TreeSummaryReq, sessions.summarise),
        ]
    )


def _end_finished(
    stream_output: Any, streamer: Any, reqs: list[Req], *args: Any, **kwargs: Any
) -> None:
    if _bound is None:
        stream_output(streamer, reqs, *args, **kwargs)
        return
    ended = [req for req in reqs if req.finished()]
    for req in ended:
        _bound.tell_failure(req)
    stream_output(streamer, reqs, *args, **kwargs)
    for req in ended:
        _bound.end(req)


def _end_aborted(_result: Any, req: Req, *_args: Any, **_kwargs: Any) -> None:
    if _bound is not None:
        _bound.end(req)
