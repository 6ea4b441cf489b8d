"""The drafters of one scheduler rank: one for each session, kept between turns, or one a request.

A request names its whole prompt, so a drafter needs no messages about commits, aborts or rollbacks:
at the start of a turn it is cut to what it shares with the prompt and extended by the rest.

An ephemeral turn only borrows its session's index, where no writer has it and little is to be
added, and gives it back as it was. Beside a writer it drafts from its own prompt if that is short,
and not at all otherwise: no long index is built for an answer that nobody continues.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stateful_sglang.draft.cost import VerifyCost
from stateful_sglang.draft.drafter import Drafter
from stateful_sglang.draft.sources.base import DraftSource

DEFAULT_MAX_BYTES = 512 << 20
"""About five million tokens of transcripts."""

ABSENCE_STEPS = 64
"""Decode steps after which a request that was not seen is taken for gone. Retraction and pipeline
stages make requests skip steps; a wrong guess costs one rebuild."""


EPHEMERAL_TOKENS = 2048
"""Most tokens that are indexed for an ephemeral turn: some three milliseconds of a decode step."""


class SessionTurn(Protocol):
    """What is asked of a turn in flight."""

    @property
    def session_id(self) -> str: ...

    @property
    def kind(self) -> str: ...


class _Entry(NamedTuple):
    drafter: Drafter | None
    """None: this request drafts nothing."""
    session_id: str | None
    prompt_len: int
    own: bool
    """Whether the drafter is this request's alone, and gone with it."""
    give_back: int | None = None
    """Of a borrowed index: tokens that it had before, and has again afterwards."""


class DraftIndexes:
    """Drafters by session id, or by request id where no session is known.

    Beyond `max_bytes` the idle sessions that drafted longest ago are dropped, to be built again
    from the prompt should they come back.
    """

    def __init__(
        self,
        make_source: Callable[[], DraftSource],
        max_draft: int,
        cost: VerifyCost,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """`make_source` makes the source of a transcript of which nothing is known yet."""
        self._make_source = make_source
        self._max_draft = max_draft
        self._cost = cost
        self._max_bytes = max_bytes
        self._turn_of: Callable[[str], SessionTurn | None] = lambda _rid: None
        self._sessions: OrderedDict[str, Drafter] = OrderedDict()
        self._requests: dict[str, _Entry] = {}
        self._last_seen: dict[str, int] = {}
        self._step = 0

    def bind_sessions(self, turn_of: Callable[[str], SessionTurn | None]) -> None:
        """Ask `turn_of` which session a request id belongs to; None is a request without one."""
        self._turn_of = turn_of

    def __len__(self) -> int:
        """Drafters held."""
        return len(self._sessions) + len(self._own())

    @property
    def nbytes(self) -> int:
        """Memory held by all indexes, in bytes."""
        return sum(d.nbytes for d in (*self._sessions.values(), *self._own()))

    def _own(self) -> list[Drafter]:
        return [e.drafter for e in self._requests.values() if e.own and e.drafter is not None]

    def drafter(self, rid: str, prompt: Sequence[int], output: Sequence[int]) -> Drafter | None:
        """The drafter of a request, following exactly `prompt` + `output`; None: it has none."""
        entry = self._requests.get(rid)
        if entry is None:
            entry = self._begin(rid, prompt)
        self._last_seen[rid] = self._step
        if entry.drafter is None:
            return None
        known = len(entry.drafter) - entry.prompt_len
        if known > len(output):
            entry.drafter.truncate(entry.prompt_len + len(output))
        elif known < len(output):
            entry.drafter.follow(output[known:])
        return entry.drafter

    def _begin(self, rid: str, prompt: Sequence[int]) -> _Entry:
        turn = self._turn_of(rid)
        tokens = np.asarray(prompt, dtype=np.int64)
        if turn is not None and turn.kind == "ephemeral":
            entry = self._borrow(turn.session_id, tokens)
        elif turn is None:
            entry = _Entry(self._new_drafter(), None, len(tokens), own=True)
        else:
            entry = _Entry(self._claim(turn.session_id), turn.session_id, len(tokens), own=False)
        if entry.drafter is not None:
            shared = entry.drafter.common_prefix(tokens)
            entry.drafter.truncate(shared)
            entry.drafter.follow(tokens[shared:].tolist())
        self._requests[rid] = entry
        self._shrink()
        return entry

    def _claim(self, session_id: str) -> Drafter:
        """The session's index for its writer, taken back from whoever borrowed it."""
        for rid, entry in self._of(session_id):
            if entry.give_back is not None:
                self._give_back(entry)
                self._requests[rid] = _Entry(None, session_id, entry.prompt_len, own=False)
        drafter = self._sessions.get(session_id) or self._new_drafter()
        self._sessions[session_id] = drafter
        self._sessions.move_to_end(session_id)
        return drafter

    def _borrow(self, session_id: str, tokens: NDArray[np.int64]) -> _Entry:
        """What an ephemeral turn drafts from; its session's index only where nothing is cut."""
        drafter = self._sessions.get(session_id)
        in_use = any(e.drafter is not None and not e.own for _, e in self._of(session_id))
        if drafter is not None and not in_use:
            held = len(drafter)
            if len(tokens) - held <= EPHEMERAL_TOKENS and drafter.common_prefix(tokens) == held:
                return _Entry(drafter, session_id, len(tokens), own=False, give_back=held)
        own = self._new_drafter() if len(tokens) <= EPHEMERAL_TOKENS else None
        return _Entry(own, session_id, len(tokens), own=True)

    def _of(self, session_id: str) -> list[tuple[str, _Entry]]:
        return [(rid, e) for rid, e in self._requests.items() if e.session_id == session_id]

    @staticmethod
    def _give_back(entry: _Entry) -> None:
        if entry.drafter is not None and entry.give_back is not None:
            entry.drafter.truncate(entry.give_back)

    def _new_drafter(self) -> Drafter:
        return Drafter(self._make_source(), self._max_draft, self._cost)

    def _shrink(self) -> None:
        """Drop the idle sessions that drafted longest ago while over the bound."""
        excess = self.nbytes - self._max_bytes
        if excess <= 0:
            return
        in_flight = {entry.session_id for entry in self._requests.values()}
        for session_id in [s for s in self._sessions if s not in in_flight]:
            excess -= self._sessions.pop(session_id).nbytes
            if excess <= 0:
                return

    def truncate(self, session_id: str, length: int) -> None:
        """A session was cut to `length` tokens; a request of it in flight is followed anew."""
        for rid, _ in self._of(session_id):
            self.forget(rid)
        if (drafter := self._sessions.get(session_id)) is not None:
            drafter.truncate(length)

    def close(self, session_id: str) -> None:
        """Forget a session; a request of it in flight is followed anew if it comes again."""
        self._sessions.pop(session_id, None)
        for rid, _ in self._of(session_id):
            self.forget(rid)

    def forget(self, rid: str) -> None:
        """A request is gone. What its session said stays indexed, what was ephemeral doesn't."""
        entry = self._requests.pop(rid, None)
        self._last_seen.pop(rid, None)
        if entry is not None:
            self._give_back(entry)

    def end_step(self, running: Collection[str]) -> None:
        """A decode step of the requests `running` was taken; forgets those gone for long.

        Finish notices miss requests that end in prefill or are retracted for good.
        """
        self._step += 1
        for rid in running:
            if rid in self._requests:
                self._last_seen[rid] = self._step
        if len(self._requests) > len(running):
            oldest = self._step - ABSENCE_STEPS
            for rid in [r for r, seen in self._last_seen.items() if seen < oldest]:
                self.forget(rid)
