"""From a request's sampling fields to SGLang's sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stateful_sglang.api.native.schemas import AppendBody
from stateful_sglang.grammar.prepare import Kind
from stateful_sglang.session.errors import InvalidInputError

DEFAULT_MAX_TOKENS = 1024
"""Most tokens generated where a request names no number."""

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


class Constraint(NamedTuple):
    """What the answer must be like, as the client said it."""

    kind: Kind
    text: str
    """A schema or a tool list as JSON, a regular expression, or an EBNF grammar."""
    field: str
    """Of the request, for errors."""

    @property
    def engine_kind(self) -> str:
        """The sampling parameter that carries it."""
        return "json_schema" if self.kind == "tool_call" else self.kind


def sampling_params(
    body: AppendBody, *, constraint: Mapping[str, str], max_tokens: int, vocab_size: int
) -> dict[str, Any]:
    """SGLang's parameters; what the request leaves out is left to SGLang's defaults.

    Args:
        constraint: The prepared constraint as SGLang's parameter, if there is one.
        max_tokens: What fits, at most what was asked for.

    Raises:
        InvalidInputError: A token id beyond the vocabulary.
    """
    asked = body.sampling
    if asked.stop_token_ids:
        check_token_ids(asked.stop_token_ids, vocab_size, "sampling.stop_token_ids")
    params = {name: value for name in _SAME_NAME if (value := getattr(asked, name)) is not None}
    params["max_new_tokens"] = max_tokens
    if asked.min_tokens:
        params["min_new_tokens"] = min(asked.min_tokens, max_tokens)
    if asked.seed is not None:
        params["sampling_seed"] = asked.seed
    params.update(constraint)
    return params


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `InvalidInputError` naming the first id that is no token of the model."""
    if min(ids) >= 0 and max(ids) < vocab_size:
        return
    at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise InvalidInputError(
        f"{param}[{at}]", f"{ids[at]} is no token id: the vocabulary is 0 to {vocab_size - 1}"
    )


def constraint_of(body: AppendBody, tools: Sequence[Mapping[str, Any]]) -> Constraint | None:
    """What constrains the answer, if anything does.

    Raises:
        InvalidInputError: A required call without tools.
    """
    if body.tool_choice == "required":
        if not tools:
            raise InvalidInputError("tool_choice", "'required', but the session has no tools")
        return Constraint("tool_call", as_text(tools, "tool_choice"), "tool_choice")
    asked = body.sampling
    if asked.regex is not None:
        return Constraint("regex", asked.regex, "sampling.regex")
    if asked.ebnf is not None:
        return Constraint("ebnf", asked.ebnf, "sampling.ebnf")
    if asked.json_schema is not None:
        return _schema(asked.json_schema, "sampling.json_schema")
    if asked.response_format is None or asked.response_format.type == "text":
        return None
    wanted = asked.response_format.json_schema
    schema = {"type": "object"} if wanted is None else wanted.schema_
    return _schema(schema, "sampling.response_format")


def as_text(value: Any, field: str) -> str:
    """A parsed value as JSON again.

    Raises:
        InvalidInputError: It has numbers of thousands of digits, or no end of levels.
    """
    try:
        return json.dumps(value)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(field, f"can't be written as JSON: {error}") from error


def _schema(schema: dict[str, Any], field: str) -> Constraint:
    return Constraint("json_schema", as_text(schema, field), field)
