"""How to generate, as a request says it."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from stateful_sglang.api.native.bodies import Body, JsonSchema, refusal
from stateful_sglang.service.commands import AskedConstraint
from stateful_sglang.service.plan import as_text
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.session.bounds import INT32_MAX, SAMPLING

MAX_STOPS = 16
"""SGLang compares every generated token with every stop string."""


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("json_schema goes with type 'json_schema', and only with it")
        return self


StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class SamplingBody(Body):
    """How to generate. What is left out takes the server's default."""

    max_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    min_tokens: int | None = Field(default=None, **SAMPLING["min_new_tokens"].field())
    temperature: float | None = Field(default=None, **SAMPLING["temperature"].field())
    top_p: float | None = Field(default=None, **SAMPLING["top_p"].field())
    top_k: int | None = Field(default=None, **SAMPLING["top_k"].field())
    min_p: float | None = Field(default=None, **SAMPLING["min_p"].field())
    frequency_penalty: float | None = Field(default=None, **SAMPLING["frequency_penalty"].field())
    presence_penalty: float | None = Field(default=None, **SAMPLING["presence_penalty"].field())
    repetition_penalty: float | None = Field(default=None, **SAMPLING["repetition_penalty"].field())
    stop: StopText | list[StopText] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOPS)
    seed: int | None = Field(default=None, **SAMPLING["sampling_seed"].field())
    ignore_eos: bool | None = None
    json_schema: JsonSchema | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(default=None, min_length=1)
    ebnf: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> SamplingBody:
        if self.top_k == 0:
            raise refusal("-1 (off) or at least 1, not 0", "top_k")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise refusal(f"at most {MAX_STOPS} strings", "stop")
        if (self.min_tokens or 0) > (self.max_tokens or float("inf")):
            raise refusal("more than max_tokens", "min_tokens")
        if len(self.constraints()) > 1:
            given = ", ".join(self.constraints())
            raise refusal(f"only one constraint at a time, not {given}", given)
        return self

    def constraints(self) -> list[str]:
        """Fields given that constrain the text."""
        names = [
            name for name in ("json_schema", "regex", "ebnf") if getattr(self, name) is not None
        ]
        if self.response_format is not None and self.response_format.type != "text":
            names.append("response_format")
        return names

    def to_sampling(self) -> Sampling:
        """As the service takes it."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        same = {name: getattr(self, name) for name in _SAME_NAME}
        return Sampling(**same, stop=stop, stop_token_ids=tuple(self.stop_token_ids or ()))

    def to_constraint(self) -> AskedConstraint | None:
        """What the answer must be like, if the request says.

        Raises:
            InvalidInputError: A schema can't be written as JSON again.
        """
        if self.regex is not None:
            return AskedConstraint("regex", self.regex, "sampling.regex")
        if self.ebnf is not None:
            return AskedConstraint("ebnf", self.ebnf, "sampling.ebnf")
        if self.json_schema is not None:
            return _schema(self.json_schema, "sampling.json_schema")
        if self.response_format is None or self.response_format.type == "text":
            return None
        wanted = self.response_format.json_schema
        schema = {"type": "object"} if wanted is None else wanted.schema_
        return _schema(schema, "sampling.response_format")


_SAME_NAME = tuple(
    field.name for field in fields(Sampling) if field.name not in ("stop", "stop_token_ids")
)


def _schema(schema: dict[str, Any], field: str) -> AskedConstraint:
    return AskedConstraint("json_schema", as_text(schema, field), field)
