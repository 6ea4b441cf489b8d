"""Sessions as one scheduler rank holds them: tokens, and the turn in flight.

The API process owns versions. A rank only keeps what the API told it to keep: every turn arrives
with ``base_len``, the committed length, and whatever the rank holds beyond it (an aborted turn, a
commit that was never published) is dropped before the delta is appended. So an abort needs no
message of its own, and every rank of a tensor-parallel group takes the same decisions from the
same requests. An ephemeral turn only reads: nothing is dropped for it and nothing of it is kept.

Transcripts are views of shared storage: a fork of a session is a pointer, and so is what a turn
leaves behind when it is dropped.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Literal, NamedTuple

from stateful_sglang.session.ids import digest
from stateful_sglang.session.transcript import Transcript

RankTurnKind = Literal["turn", "ephemeral", "prefill"]
"""What a rank keeps of a turn that ends well: delta and output, nothing, or the delta alone."""


class RankTurn(NamedTuple):
    """A turn in flight on a rank."""

    session_id: str
    base_len: int
    """Committed tokens before the turn."""
    prompt_len: int
    """``base_len`` plus the delta: what the model is asked to continue."""
    kind: RankTurnKind = "turn"
    """``ephemeral`` also when what the turn continues was closed or rolled back meanwhile."""


class TurnRefusedError(RuntimeError):
    """A rank can't run a turn; `kind` is stable and travels to the API process."""

    kind: str


class StaleBaseError(TurnRefusedError):
    """The rank holds fewer tokens than the API says are committed."""

    kind = "stale_base"

    def __init__(self, session_id: str, base_len: int, held: int) -> None:
        super().__init__(
            f"session {digest(session_id)}: the turn continues {base_len} committed tokens, but "
            f"this rank holds {held}; the scheduler was restarted or its state was lost. "
            "Open a new session."
        )


class BusySessionError(TurnRefusedError):
    """A second turn arrived while one is in flight: the API admits one writer a session."""

    kind = "busy"

    def __init__(self, session_id: str, rid: str) -> None:
        super().__init__(
            f"session {digest(session_id)} already runs turn {rid}; one writer a session is "
            "expected. Wait for the turn to end, or abort it."
        )


class RankSessions:
    """All sessions of one rank. Not thread-safe: the scheduler's loop is its only caller."""

    def __init__(self) -> None:
        self._tokens: dict[str, Transcript] = {}
        self._turns: dict[str, RankTurn] = {}
        self._deltas: dict[str, array[int]] = {}
        """Of the turns in flight, by request: they become tokens of the session at a good end."""
        self._rid_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._tokens

    def begin_turn(
        self,
        session_id: str,
        rid: str,
        base_len: int,
        delta: array[int],
        kind: RankTurnKind = "turn",
    ) -> array[int]:
        """Start a turn and return the whole prompt, typecode 'q', as a copy.

        Args:
            session_id: A new id with ``base_len`` 0 creates the session, unless it's ephemeral.
            rid: The request's id, unique among the requests in flight.
            base_len: Committed length; tokens held beyond it are dropped. An ephemeral turn starts
                from so many tokens, drops none, and runs beside any other turn.
            delta: New tokens, typecode 'q'.
            kind: What is kept of the turn when it ends well.

        Raises:
            StaleBaseError: Fewer than ``base_len`` tokens are held.
            BusySessionError: Another turn of the session is in flight, and this one is no
                ephemeral one.
        """
        if kind == "ephemeral":
            transcript = self._held(session_id, base_len)
        else:
            if (running := self._rid_of.get(session_id)) is not None:
                raise BusySessionError(session_id, running)
            transcript = self._held(session_id, base_len)
            self._tokens[session_id] = transcript.cut(base_len)
            self._rid_of[session_id] = rid
            self._deltas[rid] = delta
        self._turns[rid] = RankTurn(session_id, base_len, base_len + len(delta), kind)
        prompt = transcript.wide(0, base_len)
        prompt.extend(delta)
        return prompt

    def fork(self, source_id: str, session_id: str, length: int) -> None:
        """Start a session with the first `length` tokens of another; nothing is copied.

        What the source has in flight takes no part, and both go on independently.

        Raises:
            StaleBaseError: The source holds fewer tokens.
            ValueError: A session of that id exists.
        """
        if session_id in self._tokens:
            raise ValueError("cannot fork into a session that exists; take a new id")
        self._tokens[session_id] = self._held(source_id, length).cut(length)

    def _held(self, session_id: str, length: int) -> Transcript:
        """What the session holds, at least `length` tokens."""
        transcript = self._tokens.get(session_id) or Transcript()
        if len(transcript) < length:
            raise StaleBaseError(session_id, length, len(transcript))
        return transcript

    def turn_of(self, rid: str) -> RankTurn | None:
        """The turn that request ``rid`` runs, or None for a request without a session."""
        return self._turns.get(rid)

    def finish_turn(self, rid: str, output_ids: Iterable[int] | None) -> RankTurn | None:
        """End a turn: keep it provisionally, or drop it when ``output_ids`` is None.

        A prefill's output is dropped in any case, an ephemeral turn whole. Ending a turn that is
        not in flight does nothing, so that every path on which a scheduler lets go of a request may
        call it.
        """
        turn = self._turns.pop(rid, None)
        if turn is None or turn.kind == "ephemeral":
            return turn
        del self._rid_of[turn.session_id]
        delta = self._deltas.pop(rid)
        if output_ids is not None:
            kept = self._tokens[turn.session_id].extended(delta)
            if turn.kind == "turn":
                kept = kept.extended(output_ids)
            self._tokens[turn.session_id] = kept
        return turn

    def rollback(self, session_id: str, length: int) -> bool:
        """Drop a session's tokens beyond `length`; False where it holds no more than that.

        A turn in flight that continues dropped tokens ends without effect.
        """
        transcript = self._tokens.get(session_id)
        if transcript is None or length >= len(transcript):
            return False
        self._orphan_writer(session_id)
        self._tokens[session_id] = transcript.cut(length)
        return True

    def close(self, session_id: str) -> bool:
        """Forget a session; turns in flight end without effect. False if it was unknown."""
        if self._tokens.pop(session_id, None) is None:
            return False
        self._orphan_writer(session_id)
        return True

    def _orphan_writer(self, session_id: str) -> None:
        """Let the session's turn in flight go on alone, so that another may start at once."""
        rid = self._rid_of.pop(session_id, None)
        if rid is not None:
            del self._deltas[rid]
            self._turns[rid] = self._turns[rid]._replace(kind="ephemeral")
