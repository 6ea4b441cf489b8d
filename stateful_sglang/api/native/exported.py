"""An exported session as a request brings it: its form, checked before anything is made of it.

What the fields mean, and whether they fit together, is the service's to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, model_validator

from stateful_sglang.api.native.bodies import Body, refusal
from stateful_sglang.api.native.messages import ToolBody
from stateful_sglang.api.native.schemas import OptionsBody
from stateful_sglang.service.exchange import FORMAT
from stateful_sglang.session.bounds import INT64_MAX, VERSION

_TIME = {"ge": 0, "le": 1e12}
"""Seconds since the epoch."""


def _of_this_format(given: str) -> str:
    if given != FORMAT:
        raise refusal(f"{given[:64]!r} is not {FORMAT!r}: not an exported session")
    return given


class ExportedMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    """Left out where it is as `raw`."""
    tool_calls: list[tuple[str, str, Any]] = Field(default_factory=list)
    """Id, name and arguments of each."""
    tool_call_id: str | None = None
    name: str | None = None
    raw: str | None = None
    tokens: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_text(self) -> ExportedMessage:
        given = [self.content] if "content" in self.model_fields_set else [self.raw]
        if None in given:
            raise refusal("text is missing", "content")
        return self


class ExportedHead(Body):
    system: str | None
    tools: list[ToolBody]
    template_kwargs: dict[str, Any]
    verbatim: StrictBool = False


class ExportedCommit(Body):
    version: StrictInt = Field(**VERSION.field())
    parent: StrictInt | None = Field(**VERSION.field())
    base_len: StrictInt = Field(ge=0, le=INT64_MAX)
    tokens: str
    messages: list[ExportedMessage]
    pending: list[ExportedMessage]
    raw: bool
    finish_reason: str | None
    created_at: float = Field(**_TIME)
    head: ExportedHead | None = None


class ExportedBody(Body):
    """What ``GET /v1/sessions/{id}/export`` answered."""

    format: Annotated[str, AfterValidator(_of_this_format)]
    model: str
    options: OptionsBody
    created_at: float = Field(**_TIME)
    version: StrictInt = Field(**VERSION.field())
    newest: StrictInt = Field(**VERSION.field())
    commits: list[ExportedCommit] = Field(min_length=1)

    def to_export(self) -> dict[str, Any]:
        """As the service takes it: what was left out stays out."""
        return self.model_dump(mode="json", exclude_unset=True)
