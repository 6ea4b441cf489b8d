"""SGLang's tokenizer manager, taught turns: what leaves the API process for the scheduler ranks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
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
from stateful_sglang.service.engine import TurnRequest
from stateful_sglang.session.ids import digest

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
        "fork, rollback, close, publish and tree requests leave the API process as SGLang's own do",
    ),
    Attachment(
        f"{_MANAGER}.generate_request",
        "subclass",
        "a request that names a conversation is run as a turn of its session",
    ),
    Attachment(
        "sglang.srt.entrypoints.engine.init_tokenizer_manager",
        "relies",
        "SGLang's launcher takes the tokenizer manager's class as an argument",
    ),
)

_REPLY_TIMEOUT_S = 30.0


class TurnOrigin:
    """What a turn continues. No dataclass: SGLang's request log writes out every field of one."""

    __slots__ = ("base_len", "kind", "salt", "session_id")

    def __init__(self, turn: TurnRequest) -> None:
        self.session_id = turn.session_id
        self.base_len = turn.base_len
        self.kind = turn.kind
        self.salt = turn.salt

    def __repr__(self) -> str:
        return f"TurnOrigin({digest(self.session_id)}, base_len={self.base_len}, {self.kind})"


@dataclass
class TurnInput(GenerateReqInput):
    """A generate request that stands for one turn of a session."""

    turn: TurnOrigin | None = None


class StatefulTokenizerManager(TokenizerManager):
    """SGLang's tokenizer manager, sending turns as append requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replies: dict[str, asyncio.Future[Any]] = {}
        self.follow: Callable[[Any, Any], AsyncIterator[Any]] | None = None
        """Runs requests that name a conversation; None where none does."""
        self.chat_class: type[Any] | None = None
        """SGLang's chat route of another kind; None for its own."""
        self._result_dispatcher += TypeBasedDispatcher(
            [
                (TreeSummaryReqOutput, self._handle_reply),
                (PrefixPublishReqOutput, self._handle_reply),
            ]
        )

    def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """SGLang's generator itself, so that an ordinary request costs nothing more; a request that
        names a conversation is run as a turn of its session."""
        if self.follow is None or getattr(obj, "conversation", None) is None:
            outputs: AsyncIterator[Any] = super().generate_request(obj, request)
            return outputs
        return self.follow(obj, request)

    @property
    def serving_chat_class(self) -> type[Any]:
        """SGLang's class of the chat routes, or ours over implicit sessions."""
        return self.chat_class or super().serving_chat_class  # type: ignore[no-any-return]

    def _create_tokenized_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        tokenized = super()._create_tokenized_object(obj, *args, **kwargs)
        turn = getattr(obj, "turn", None)
        if turn is None:
            return tokenized
        assert isinstance(tokenized, TokenizedGenerateReqInput)
        # Told here and not in the input: SGLang's request log would write a salt out.
        fields = msgspec.structs.asdict(tokenized) | {"cache_salt": turn.salt}
        return SessionAppendReq(
            **fields, stateful_session=turn.session_id, base_len=turn.base_len, kind=turn.kind
        )

    def send_session_fork(self, source_id: str, session_id: str, length: int) -> None:
        """Tell every rank to start a session with another's first tokens."""
        self._dispatch_to_scheduler(
            SessionForkReq(source_session=source_id, stateful_session=session_id, length=length)
        )

    def send_session_rollback(self, session_id: str, length: int) -> None:
        """Tell every rank to drop a session's tokens beyond a length."""
        self._dispatch_to_scheduler(SessionRollbackReq(stateful_session=session_id, length=length))

    def send_session_close(self, session_id: str) -> None:
        """Tell every rank to forget a session."""
        self._dispatch_to_scheduler(SessionCloseReq(stateful_session=session_id))

    def send_unpublish(self, prefix_id: str) -> None:
        """Tell every rank to share a prefix no longer."""
        self._dispatch_to_scheduler(PrefixUnpublishReq(prefix_id=prefix_id))

    async def publish(self, prefix_id: str, tokens: list[int]) -> PrefixPublishReqOutput:
        """Tell every rank to share a prefix among requests of all salts.

        Returns:
            What the first rank answers; the others decide alike.

        Raises:
            TimeoutError: As of `tree_summary`; a rank may do it yet.
        """
        reply: PrefixPublishReqOutput = await self._ask(
            PrefixPublishReq(rid=secrets.token_hex(16), prefix_id=prefix_id, tokens=tokens)
        )
        return reply

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Ask the scheduler to describe its tree.

        Raises:
            TimeoutError: The scheduler did not answer; it is busy in one very long step, or gone.
        """
        reply: TreeSummaryReqOutput = await self._ask(
            TreeSummaryReq(rid=secrets.token_hex(16), stateful_session=session_id, limit=limit)
        )
        return reply.summary

    async def _ask(self, request: PrefixPublishReq | TreeSummaryReq) -> Any:
        self.auto_create_handle_loop()
        assert isinstance(request.rid, str)
        future = asyncio.get_running_loop().create_future()
        self._replies[request.rid] = future
        try:
            self._dispatch_to_scheduler(request)
            return await asyncio.wait_for(future, _REPLY_TIMEOUT_S)
        finally:
            del self._replies[request.rid]

    def _handle_reply(self, reply: TreeSummaryReqOutput | PrefixPublishReqOutput) -> None:
        future = self._replies.get(str(reply.rid))
        if future is not None and not future.done():
            future.set_result(reply)


def stateful_tokenizer_manager(on_ready: Callable[[StatefulTokenizerManager], None]) -> Any:
    """SGLang's ``init_tokenizer_manager`` for our class; ``on_ready`` sees the manager it made."""
    init = partial(init_tokenizer_manager, TokenizerManagerClass=StatefulTokenizerManager)

    def build(*args: Any, **kwargs: Any) -> Any:
        manager, templates = init(*args, **kwargs)
        on_ready(manager)
        return manager, templates

    return build
