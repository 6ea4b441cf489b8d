"""What is recorded of a session beside its commits: whose it is, how long it is kept, where it is.

These are the rows of a journal as data. The API process owns them; nothing of them reaches a rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

DEFAULT_TENANT = "default"
"""Whose everything is where no keys exist."""

Retention = Literal["none", "soft", "reserved"]
"""How hard a session's KV is kept while it is idle."""
State = Literal["open", "closed", "expired"]

MAX_TTL_S = 366 * 24 * 3600
MAX_KEY_LENGTH = 256
"""Characters of an idempotency key."""
KEYS_KEPT_S = 24 * 3600
"""Seconds that the result of a keyed operation is kept."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session is kept, as its owner asked for."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    """Seconds without a use after which it expires; None: the server's default."""
    retention: Retention = "soft"
    priority: int = 0
    private: bool = False
    """Its text never feeds another session's drafts."""


class CommitRef(NamedTuple):
    """A commit by name."""

    owner: str
    """The session that made it."""
    version: int


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One session, as a list or an error needs it: no tokens, no messages."""

    id: str
    tenant: str
    model: str
    """Digest of the model and its template: no other one may continue the session."""
    options: SessionOptions
    created_at: float
    """Seconds since the epoch, as all times here."""
    used_at: float
    """Its last turn, change or touch: what idleness and order in lists are counted from."""
    state: State = "open"
    version: int = 0
    """Of the tip."""
    newest: int = 0
    """The newest version given out."""
    tokens: int = 0
    """Of the tip."""
    messages: int = 0
    """Of the tip, those not rendered yet left out."""
    pending: int = 0
    """Messages of the tip that the next turn renders."""
    tools: tuple[str, ...] = ()
    """Names of its head's functions."""
    finish_reason: str | None = None
    """Of the tip."""
    origin: CommitRef | None = None
    """Where it was forked from; None: it was opened."""


@dataclass(frozen=True, slots=True)
class KeyedResult:
    """What an operation with an idempotency key gave, to be given again."""

    tenant: str
    scope: str
    """The session it was asked of; empty for what makes a session."""
    key: str
    digest: str
    """Of what was asked: the same key with another request is an error."""
    result: Mapping[str, Any]
    """As JSON has it."""
    created_at: float


@dataclass(frozen=True, slots=True)
class PrefixRecord:
    """A prefix that is published to all tenants until it is removed."""

    id: str
    name: str | None
    """What people call it."""
    model: str
    """Digest of the model and its template: with another one it is not published."""
    tokens: array[int]
    """Typecode 'q'."""
    created_at: float
