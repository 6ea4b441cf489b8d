"""Sessions as one scheduler rank holds them: tokens, and the turn in flight.

The API process owns versions. A rank only keeps what the API told it to keep: every turn arrives
with ``base_len``, the committed length, and whatever the rank holds beyond it (an aborted turn, a
commit that was never published) is dropped before the delta is appended. So an abort needs no
message of its own, and every rank of a tensor-parallel group takes the same decisions from the
same requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from stateful_sglang.session.transcript import Transcript


class RankTurn(NamedTuple):
    """A turn in flight on a rank."""

    session_id: str
    base_len: int
    """Committed tokens before the turn."""
    prompt_len: int
    """``base_len`` plus the delta: what the model is asked to continue."""


class StaleBaseError(LookupError):
    """The rank holds fewer tokens than the API says are committed."""

    def __init__(self, session_id: str, base_len: int, held: int) -> None:
        super().__init__(
            f"session {session_id}: the turn continues {base_len} committed tokens, but this rank "
            f"holds {held}; the scheduler was restarted or its state was lost. Open a new session."
        )


class BusySessionError(RuntimeError):
    """A second turn arrived while one is in flight: the API admits one writer a session."""

    def __init__(self, session_id: str, rid: str) -> None:
        super().__init__(
            f"session {session_id} already runs turn {rid}; one writer a session is expected. "
            "Wait for the turn to end, or abort it."
        )


class RankSessions:
    """All sessions of one rank. Not thread-safe: the scheduler's loop is its only caller."""

    def __init__(self) -> None:
        self._tokens: dict[str, Transcript] = {}
        self._turns: dict[str, RankTurn] = {}
        self._rid_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._tokens

    def begin_turn(self, session_id: str, rid: str, base_len: int, delta: array[int]) -> array[int]:
        """Start a turn and return the whole prompt, typecode 'q', as a copy.

        Args:
            session_id: A new id with ``base_len`` 0 creates the session.
            rid: The request's id, unique among the requests in flight.
            base_len: Committed length; tokens held beyond it are dropped.
            delta: New tokens, typecode 'q'.

        Raises:
            StaleBaseError: Fewer than ``base_len`` tokens are held.
            BusySessionError: Another turn of the session is in flight.
        """
        if (running := self._rid_of.get(session_id)) is not None:
            raise BusySessionError(session_id, running)
        transcript = self._tokens.get(session_id)
        held = len(transcript) if transcript is not None else 0
        if held < base_len:
            raise StaleBaseError(session_id, base_len, held)
        if transcript is None:
            transcript = self._tokens[session_id] = Transcript()
        transcript.truncate(base_len)
        transcript.extend(delta)
        self._turns[rid] = RankTurn(session_id, base_len, len(transcript))
        self._rid_of[session_id] = rid
        return array("q", transcript)

    def turn_of(self, rid: str) -> RankTurn | None:
        """The turn that request ``rid`` runs, or None for a request without a session."""
        return self._turns.get(rid)

    def finish_turn(self, rid: str, output_ids: Iterable[int] | None) -> RankTurn | None:
        """End a turn: keep its output provisionally, or drop the turn when ``output_ids`` is None.

        Ending a turn that is not in flight does nothing, so that every path on which a scheduler
        lets go of a request may call it.
        """
        turn = self._turns.pop(rid, None)
        if turn is None:
            return None
        del self._rid_of[turn.session_id]
        transcript = self._tokens.get(turn.session_id)
        if transcript is not None:
            if output_ids is None:
                transcript.truncate(turn.base_len)
            else:
                transcript.extend(output_ids)
        return turn

    def close(self, session_id: str) -> bool:
        """Forget a session; a turn in flight ends without effect. False if it was unknown."""
        return self._tokens.pop(session_id, None) is not None
