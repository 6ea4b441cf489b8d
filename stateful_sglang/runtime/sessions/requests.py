"""Messages between the API process and the scheduler ranks.

The append is a kind of SGLang's tokenised generate request, because SGLang decides by type which
messages are work: data-parallel routing, tensor-parallel broadcast and unpickling all ask
``isinstance``. Pickle, SGLang's default between its own processes, carries all of them.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, TokenizedGenerateReqInput

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.session.rank import RankTurnKind

ATTACHMENTS = (
    Attachment(
        "sglang.srt.managers.io_struct.TokenizedGenerateReqInput",
        "subclass",
        "the append request: routed like a generate request, carrying the delta only",
    ),
    Attachment(
        "sglang.srt.managers.io_struct.BaseReq",
        "subclass",
        "control messages: fork, cut or close a session, publish a prefix, describe the tree",
    ),
)


class SessionAppendReq(TokenizedGenerateReqInput, kw_only=True):
    """One turn: ``input_ids`` holds the delta, the rank holds what precedes it."""

    stateful_session: str
    base_len: int
    """Committed transcript length in tokens; a rank drops what it holds beyond it."""
    kind: RankTurnKind = "turn"


class SessionForkReq(BaseReq, kw_only=True):
    """Start a session with another's first tokens. Not answered: a rank that can't says so at the
    new session's first turn."""

    source_session: str
    stateful_session: str
    length: int
    """Tokens that both have."""


class SessionRollbackReq(BaseReq, kw_only=True):
    """Drop a session's tokens beyond a length. Not answered."""

    stateful_session: str
    length: int
    """Tokens that stay."""


class SessionCloseReq(BaseReq, kw_only=True):
    """Forget a session: its tokens, its pin, its draft index. Not answered."""

    stateful_session: str


class PrefixPublishReq(BaseReq, kw_only=True):
    """Let requests of all salts share the KV of these tokens."""

    prefix_id: str
    tokens: list[int]


class PrefixPublishReqOutput(BaseReq, kw_only=True):
    """The answer to a :class:`PrefixPublishReq` with the same ``rid``."""

    aligned_tokens: int
    """How many of them are shared: whole pages."""
    problem: str | None
    """Why nothing was published; None: it was."""


class PrefixUnpublishReq(BaseReq, kw_only=True):
    """Share a prefix no longer. Not answered."""

    prefix_id: str


class TreeSummaryReq(BaseReq, kw_only=True):
    """Describe the prefix tree, or one session's path in it."""

    stateful_session: str | None
    limit: int
    """Most nodes to list."""


class TreeSummaryReqOutput(BaseReq, kw_only=True):
    """The answer to a :class:`TreeSummaryReq` with the same ``rid``."""

    summary: dict[str, Any]
