"""What every request that changes a session shares: its turn among writers, and its key."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from stateful_sglang.api.native.bodies import Body
from stateful_sglang.service.commands import DEFAULT_WAIT_S, MAX_WAIT_S, Key, Writing
from stateful_sglang.session.bounds import VERSION
from stateful_sglang.session.records import MAX_KEY_LENGTH

NOT_ASKED = frozenset(
    {"idempotency_key", "stream", "return_output_ids", "on_busy", "wait_s", "detach"}
)
"""Fields that say how a request waits and how it is answered, not what it asks for: the same
request may be sent again with others of them."""

KeyText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY_LENGTH)]


class KeyedBody(Body):
    """A request that may be sent again: with its key it is done once."""

    operation: ClassVar[str]
    """What the request asks for; a key belongs to one request of one operation."""

    idempotency_key: KeyText | None = None

    def to_key(self) -> Key | None:
        """The key, with a digest of what is asked."""
        return None if self.idempotency_key is None else Key(self.idempotency_key, self.digest())

    def digest(self) -> str:
        """SHA-256 of the operation and the canonical JSON of what is asked for.

        Defaults are left out, so that a server with a new field still knows an older request.
        """
        asked = self.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_ASKED))
        text = json.dumps([self.operation, asked], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class WritingBody(KeyedBody):
    """A request that takes its turn at a session, which has one writer at a time."""

    expected_version: int | None = Field(default=None, **VERSION.field())
    on_busy: Literal["wait", "fail"] = "wait"
    wait_s: float = Field(default=DEFAULT_WAIT_S, ge=0, le=MAX_WAIT_S)

    def to_writing(self) -> Writing:
        """As the service takes it."""
        return Writing(self.on_busy, self.wait_s, self.expected_version, self.to_key())
