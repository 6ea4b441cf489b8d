"""Bodies of requests that change a session without asking for an answer."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, model_validator

from stateful_sglang.api.native.bodies import Body, refusal
from stateful_sglang.api.native.exported import ExportedBody
from stateful_sglang.api.native.messages import MessageBody
from stateful_sglang.api.native.schemas import PRIORITY, Metadata, kept
from stateful_sglang.api.native.writing import KeyedBody, WritingBody
from stateful_sglang.service.commands import Edit, Fork, Ingest, Key, Rollback, Touch
from stateful_sglang.session.bounds import TTL_S, VERSION
from stateful_sglang.session.records import Retention, SessionOptions


class IngestBody(WritingBody):
    """``POST /v1/sessions/{id}/ingest``: messages to compute without answering."""

    operation: ClassVar[str] = "ingest"

    messages: list[MessageBody] = Field(min_length=1)

    def to_command(self) -> Ingest:
        """As the service takes it."""
        return Ingest(kept(self.messages), self.to_writing())


class KeptBody(Body):
    """How a session is kept from now on; what is left out is as it was."""

    metadata: Metadata | None = None
    ttl_s: float | None = Field(default=None, **TTL_S.field())
    retention: Retention | None = None
    priority: int | None = Field(default=None, **PRIORITY.field())


class ForkBody(KeptBody, KeyedBody):
    """``POST /v1/sessions/{id}/fork``: another session with the same past."""

    operation: ClassVar[str] = "fork"

    version: int | None = Field(default=None, **VERSION.field())
    private: bool | None = None

    def option_changes(self) -> dict[str, Any]:
        """Options in which the new session differs from its source, as fields of them."""
        given = {name: getattr(self, name) for name in _OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def to_command(self, source: SessionOptions | None) -> Fork:
        """As the service takes it; `source` has the options of the session that is forked."""
        changes = self.option_changes()
        options = replace(source or SessionOptions(), **changes) if changes else None
        return Fork(self.version, options, self.to_key())


_OPTIONS = tuple(each.name for each in fields(SessionOptions))


class RollbackBody(WritingBody):
    """``POST /v1/sessions/{id}/rollback``: back to a version."""

    operation: ClassVar[str] = "rollback"

    version: int = Field(**VERSION.field())

    def to_command(self) -> Rollback:
        """As the service takes it."""
        return Rollback(self.version, self.to_writing())


class EditBody(WritingBody):
    """``POST /v1/sessions/{id}/edit``: other messages in the place of some turns'."""

    operation: ClassVar[str] = "edit"

    after: int = Field(**VERSION.field())
    through: int | None = Field(default=None, **VERSION.field())
    messages: list[MessageBody] = Field(default_factory=list)

    @model_validator(mode="after")
    def _a_range(self) -> EditBody:
        if self.through is not None and self.through < self.after:
            raise refusal("before the version that the edit begins after", "through")
        return self

    def to_command(self) -> Edit:
        """As the service takes it."""
        return Edit(self.after, kept(self.messages), self.through, self.to_writing())


class TouchBody(KeptBody):
    """``POST /v1/sessions/{id}/touch``: it is in use; what is left out stays as it is."""

    def to_command(self) -> Touch:
        """As the service takes it."""
        return Touch(self.ttl_s, self.retention, self.priority, self.metadata)


class Import(NamedTuple):
    """What is asked of the service's `import_`."""

    session: dict[str, Any]
    key: Key | None
    accept_other_model: bool


class ImportBody(KeyedBody):
    """``POST /v1/sessions/import``: a session that another server exported."""

    operation: ClassVar[str] = "import"

    session: ExportedBody
    accept_other_model: bool = False

    def to_command(self) -> Import:
        """As the service takes it."""
        return Import(self.session.to_export(), self.to_key(), self.accept_other_model)
