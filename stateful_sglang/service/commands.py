"""What a caller asks of a service of sessions, whatever wire form it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stateful_sglang.service.sampling import ConstraintKind, Sampling
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import DEFAULT_TENANT, Retention, SessionOptions, State
from stateful_sglang.tenants import TenantLimits

ToolChoice = Literal["auto", "none", "required"]

DEFAULT_WAIT_S = 10.0
MAX_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    tenant: str = DEFAULT_TENANT
    salt: str | None = field(default=None, repr=False)
    """What the tenant's KV is kept apart by; None where there is one tenant."""
    limits: TenantLimits | None = None
    """None: the server's own."""


@dataclass(frozen=True, slots=True)
class Key:
    """An idempotency key: what is asked under it again is answered with what it gave before."""

    key: str
    digest: str
    """Of what is asked, the form of the answer left out."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How a caller takes its turn at a session, which has one writer at a time."""

    on_busy: Literal["wait", "fail"] = "wait"
    wait_s: float = DEFAULT_WAIT_S
    """Seconds to wait for others' turns, 0 to `MAX_WAIT_S`."""
    expected_version: int | None = None
    """Refuse unless the session is at this version when the caller's turn comes."""
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish a prefix: a head as every conversation with it begins, or raw text or tokens."""

    content: Head | NewText | NewTokens
    name: str | None = None
    """What people call it."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Open a session; nothing is computed."""

    head: Head = field(default_factory=Head)
    messages: tuple[Message, ...] = ()
    """What the first append begins with."""
    options: SessionOptions = field(default_factory=SessionOptions)
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class NewMessages:
    """Messages to append, rendered by the model's chat template behind those that are pending.
    None at all: the answer is to what is there."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class NewText:
    """Text that continues the transcript, outside any chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that continue the transcript."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class AskedConstraint:
    """What the answer must be like, as the caller said it."""

    kind: ConstraintKind
    text: str
    """A schema as JSON, a regular expression, or an EBNF grammar."""
    field: str
    """Of the caller's request, for errors."""


@dataclass(frozen=True, slots=True)
class Append:
    """Append what is new, and generate the answer."""

    content: NewMessages | NewText | NewTokens
    sampling: Sampling = field(default_factory=Sampling)
    constraint: AskedConstraint | None = None
    tool_choice: ToolChoice = "auto"
    """``required``: the answer is one call of a tool, which is a constraint of its own."""
    stream: bool = False
    """False: the caller reads only the end, so that progress may be sparse."""
    writing: Writing = field(default_factory=Writing)
    ephemeral: bool = False
    """Answer from the session without committing: it never waits for a writer, nor blocks one."""
    detach: bool = False
    """The turn goes on to its commit when nobody reads it any more."""


@dataclass(frozen=True, slots=True)
class Ingest:
    """Add messages without generating, their KV being computed while the caller goes on.

    Results of tools may come in any order: they are put in the order of the calls.
    """

    messages: tuple[Message, ...]
    writing: Writing = field(default_factory=Writing)


@dataclass(frozen=True, slots=True)
class Fork:
    """Open a session that shares another's past; nothing is copied and nothing computed."""

    version: int | None = None
    """None: the version it is at."""
    options: SessionOptions | None = None
    """None: the source's."""
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class Rollback:
    """Take the session back to one of its versions."""

    version: int
    writing: Writing = field(default_factory=Writing)


@dataclass(frozen=True, slots=True)
class Edit:
    """Put other messages in the place of what some turns said, or drop it; later turns stay.

    The turns are those after version `after`, up to version `through`; both are on the way to the
    version that the session is at. What stands before them is kept with its KV.
    """

    after: int
    messages: tuple[Message, ...] = ()
    through: int | None = None
    """None: up to the end."""
    writing: Writing = field(default_factory=Writing)


@dataclass(frozen=True, slots=True)
class Touch:
    """Say that a session is in use; what is None stays as it is."""

    ttl_s: float | None = None
    retention: Retention | None = None
    priority: int | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ListSessions:
    """Which of the caller's sessions to list, the last used first."""

    limit: int = 100
    after: str | None = None
    """The id that the last page ended with."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Only those with all of these pairs."""
    state: State | None = "open"
    """None: of any state."""
