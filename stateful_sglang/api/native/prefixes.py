"""Routes that publish prefixes to all tenants. The guard lets administrators alone come here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from stateful_sglang.api.native.bodies import Body, refusal
from stateful_sglang.api.native.messages import Text, ToolBody
from stateful_sglang.api.native.requests import Serving, body_docs
from stateful_sglang.api.native.schemas import check_head, head_of
from stateful_sglang.service.commands import NewText, NewTokens, Publish


class PublishBody(Body):
    """``POST /v1/prefixes``: what a session is opened with, or raw text or tokens."""

    system: Text | None = Field(default=None, min_length=1)
    tools: list[ToolBody] = Field(default_factory=list, max_length=1024)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    text: str | None = Field(default=None, min_length=1)
    input_ids: list[int] | None = Field(default=None, min_length=1)
    name: str | None = Field(default=None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _one_kind(self) -> PublishBody:
        head = self.system is not None or bool(self.tools)
        if head + (self.text is not None) + (self.input_ids is not None) != 1:
            raise refusal("give exactly one of system (and tools), text and input_ids", "system")
        if self.chat_template_kwargs and not head:
            raise refusal("there is no template in text or input_ids", "chat_template_kwargs")
        check_head(self.tools, self.chat_template_kwargs)
        return self

    def to_command(self) -> Publish:
        """As the service takes it."""
        if self.text is not None:
            return Publish(NewText(self.text), self.name)
        if self.input_ids is not None:
            return Publish(NewTokens(tuple(self.input_ids)), self.name)
        head = head_of(self.system, self.tools, self.chat_template_kwargs)
        return Publish(head, self.name)


def add_routes(router: APIRouter, serving: Serving) -> None:
    """Publish, list, remove."""
    prefixes = serving.service.prefixes

    @router.post("/prefixes", status_code=201, openapi_extra=body_docs(PublishBody))
    async def publish(request: Request) -> JSONResponse:
        """Share the KV of a prefix among all tenants, and compute it."""
        body = await serving.body(request, PublishBody)
        return JSONResponse((await prefixes.publish(body.to_command()))._asdict(), 201)

    @router.get("/prefixes")
    async def list_prefixes() -> JSONResponse:
        """The published prefixes, the oldest first."""
        return JSONResponse({"prefixes": [each._asdict() for each in await prefixes.list()]})

    @router.delete("/prefixes/{prefix_id}")
    async def remove(prefix_id: str) -> JSONResponse:
        """Publish a prefix no longer."""
        return JSONResponse((await prefixes.remove(prefix_id))._asdict())
