"""The drafters of one scheduler rank: one for each session, kept between turns, or one a request.

A request names its whole prompt, so a drafter needs no messages about commits, aborts or rollbacks:
at the start of a turn it is cut to what it shares with the prompt and extended by the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .drafter import Drafter
from .select import VerifyCost

DEFAULT_MAX_BYTES = 512 << 20
"""About five million tokens of transcripts."""

ABSENCE_STEPS = 64
"""Decode steps after which a request that was not seen is taken for gone. Retraction and pipeline
stages make requests skip steps; a wrong guess costs one rebuild."""


class SessionTurn(Protocol):
    """What is asked of a turn in flight."""

    @property
    def session_id(self) -> str: ...


class _Entry(NamedTuple):
    drafter: Drafter
    session_id: str | None
    prompt_len: int


class DraftIndexes:
    """Drafters by session id, or by request id where no session is known.

    Beyond `max_bytes` the idle sessions that drafted longest ago are dropped, to be built again
    from the prompt should they come back.
    """

    def __init__(
        self, max_draft: int, cost: VerifyCost, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
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
        anonymous = sum(entry.session_id is None for entry in self._requests.values())
        return len(self._sessions) + anonymous

    @property
    def nbytes(self) -> int:
        """Memory held by all indexes, in bytes."""
        anonymous = (e.drafter for e in self._requests.values() if e.session_id is None)
        return sum(d.nbytes for d in (*self._sessions.values(), *anonymous))

    def drafter(self, rid: str, prompt: Sequence[int], output: Sequence[int]) -> Drafter:
        """The drafter of a request, following exactly `prompt` + `output`."""
        entry = self._requests.get(rid)
        if entry is None:
            entry = self._begin(rid, prompt)
        self._last_seen[rid] = self._step
        known = len(entry.drafter) - entry.prompt_len
        if known > len(output):
            entry.drafter.truncate(entry.prompt_len + len(output))
        elif known < len(output):
            entry.drafter.follow(output[known:])
        return entry.drafter

    def _begin(self, rid: str, prompt: Sequence[int]) -> _Entry:
        turn = self._turn_of(rid)
        if turn is None:
            session_id = None
            drafter = Drafter(self._max_draft, self._cost)
        else:
            session_id = turn.session_id
            drafter = self._sessions.get(session_id) or Drafter(self._max_draft, self._cost)
            self._sessions[session_id] = drafter
            self._sessions.move_to_end(session_id)
        tokens = np.asarray(prompt, dtype=np.int64)
        shared = drafter.common_prefix(tokens)
        drafter.truncate(shared)
        drafter.follow(tokens[shared:].tolist())
        entry = self._requests[rid] = _Entry(drafter, session_id, len(tokens))
        self._shrink()
        return entry

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

    def close(self, session_id: str) -> None:
        """Forget a session; a request of it in flight is followed anew if it comes again."""
        self._sessions.pop(session_id, None)
        for rid in [r for r, e in self._requests.items() if e.session_id == session_id]:
            self.forget(rid)

    def forget(self, rid: str) -> None:
        """A request is gone. What its session said stays indexed."""
        self._requests.pop(rid, None)
        self._last_seen.pop(rid, None)

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
