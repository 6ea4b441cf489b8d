"""A turn before it runs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from stateful_sglang.session.messages import Head, Message


@dataclass(frozen=True)
class PlannedTurn:
    """An append that was accepted: what it adds, fixed before anything is computed."""

    base_len: int
    """Committed tokens the turn continues."""
    delta: array[int]
    """New tokens, typecode 'q'."""
    rewind_reason: str | None
    """Why fewer tokens are continued than were committed; None: all are."""
    head: Head
    """The session's head from this turn on."""
    messages: Sequence[Message] | None
    """New messages, those pending since the opening included; None where text or tokens were
    appended."""
