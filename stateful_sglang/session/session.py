"""One session as the API process holds it: its history, and what the ranks are sure to hold of it.

Nothing here waits: a change is prepared, recorded elsewhere, and published.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from stateful_sglang.session.errors import UnknownCommitError
from stateful_sglang.session.history import Commit, History, UnknownVersionError
from stateful_sglang.session.ids import new_session_id
from stateful_sglang.session.messages import Message
from stateful_sglang.session.records import CommitRef, SessionOptions, SessionRecord
from stateful_sglang.session.transcript import Transcript
from stateful_sglang.session.turn import PlannedTurn


@dataclass(eq=False)
class Session:
    """One conversation. Its owner is the service's directory; one writer at a time changes it."""

    id: str
    tenant: str
    history: History
    options: SessionOptions = field(default_factory=SessionOptions)
    held_len: int = 0
    """Tokens of the tip that every rank is sure to hold: fewer than are committed after a turn that
    rewound and then did not commit, and none after a restart."""
    created_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.time)

    @property
    def tip(self) -> Commit:
        """The session as last committed."""
        return self.history.tip

    @property
    def version(self) -> int:
        """The number of that commit."""
        return self.history.tip.version

    def at(self, version: int, param: str = "version") -> Commit:
        """One of its commits; `param` is the field of the caller's request that named it.

        Raises:
            UnknownCommitError: There is none of that version.
        """
        try:
            return self.history.at(version)
        except UnknownVersionError as error:
            raise UnknownCommitError(version, self.version, param) from error

    def offer(self, plan: PlannedTurn, tip: Commit) -> tuple[int, array[int]]:
        """What a turn that was planned at `tip` sends to the ranks: ``base_len`` and delta ('q').

        Where a rank may have lost tokens to an earlier turn, they come again with the delta.
        """
        held = _shared(self.held_len, self.tip.transcript, tip.transcript)
        base_len = min(plan.base_len, held)
        return base_len, tip.transcript.wide(base_len, plan.base_len) + plan.delta

    def begin(self, plan: PlannedTurn) -> tuple[int, array[int]]:
        """The same for the session's one writer, for which the ranks drop what lies behind."""
        base_len, delta = self.offer(plan, self.tip)
        self.held_len = base_len
        return base_len, delta

    def prepare(
        self,
        plan: PlannedTurn,
        output_ids: Sequence[int],
        answer: Message,
        finish_reason: str,
        said: bytes | None = None,
    ) -> Commit:
        """What the session is to be after a turn; nothing of it is seen before `publish`."""
        return self.history.prepare(
            base_len=plan.base_len,
            tokens=[*plan.delta, *output_ids],
            head=plan.head,
            messages=None if plan.messages is None else [*plan.messages, answer],
            pending=self.tip.pending if plan.messages is None else (),
            finish_reason=finish_reason,
            said=said,
        )

    def prepare_pending(self, pending: Sequence[Message], parent: Commit | None = None) -> Commit:
        """The tip, or another commit, with other pending messages and no new tokens."""
        parent = parent or self.tip
        return self.history.prepare(
            base_len=len(parent.transcript),
            tokens=(),
            head=parent.conversation.head,
            messages=(),
            pending=pending,
            finish_reason=parent.finish_reason,
            parent=parent,
        )

    def publish(self, commit: Commit, *, held: bool = False) -> None:
        """Make a prepared commit the session's version.

        Args:
            commit: What `prepare` or `prepare_pending` made.
            held: The ranks hold all of its tokens: it is what their last turn gave.
        """
        before = self.tip.transcript
        self.history.publish(commit)
        after = commit.transcript
        self.held_len = len(after) if held else _shared(self.held_len, before, after)
        self.used_at = time.time()

    def rollback(self, version: int) -> None:
        """Go back to a version; the next turn tells the ranks.

        Raises:
            UnknownCommitError: There is none of that number.
        """
        before = self.tip.transcript
        self.at(version)
        self.history.rollback(version)
        self.held_len = _shared(self.held_len, before, self.tip.transcript)
        self.used_at = time.time()

    def fork(self, version: int, options: SessionOptions | None = None) -> Session:
        """Another session that shares this one's past up to a version, while this one may run.

        Its `held_len` is what a rank can share as well: the ranks are to be told to fork this
        session at that length before the new session's first turn.

        Raises:
            UnknownCommitError: There is none of that number.
        """
        self.at(version)
        session_id = new_session_id()
        forked = Session(
            session_id,
            self.tenant,
            self.history.fork(session_id, version),
            options or self.options,
        )
        forked.held_len = _shared(self.held_len, self.tip.transcript, forked.tip.transcript)
        return forked

    def record(self, model: str, tip: Commit | None = None) -> SessionRecord:
        """The session as it is recorded, or as it is to be once it is at `tip`."""
        newest = self.history.newest if tip is None else max(self.history.newest, tip.version)
        tip = tip or self.tip
        origin = self.history.origin
        conversation = tip.conversation
        return SessionRecord(
            id=self.id,
            tenant=self.tenant,
            model=model,
            options=self.options,
            created_at=self.created_at,
            used_at=self.used_at,
            version=tip.version,
            newest=newest,
            tokens=len(tip.transcript),
            messages=len(conversation.messages),
            pending=len(tip.pending),
            tools=tuple(conversation.head.tool_names()),
            finish_reason=tip.finish_reason,
            origin=None if origin.owner == self.id else CommitRef(origin.owner, origin.version),
        )


def _shared(held_len: int, before: Transcript, after: Transcript) -> int:
    """Tokens of `after` that a rank holds which held `held_len` tokens of `before`."""
    if after is before:
        return held_len
    return min(held_len, before.common_prefix(after))
