"""From a request's sampling fields to SGLang's sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stateful_sglang.api.schemas import AppendBody, SamplingBody
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
    "regex",
    "ebnf",
)


def sampling_params(
    body: AppendBody, *, tools: Sequence[Mapping[str, Any]], max_tokens: int, vocab_size: int
) -> dict[str, Any]:
    """SGLang's parameters; what the request leaves out is left to SGLang's defaults.

    Args:
        tools: The session's tool definitions, in OpenAI's form.
        max_tokens: What fits, at most what was asked for.

    Raises:
        InvalidInputError: A token id beyond the vocabulary, or a required call without tools.
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
    schema = _output_schema(asked)
    if body.tool_choice == "required":
        if not tools:
            raise InvalidInputError("tool_choice", "'required', but the session has no tools")
        schema = tool_call_schema(tools)
    if schema is not None:
        params["json_schema"] = json.dumps(schema)
    return params


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `InvalidInputError` naming the first id that is no token of the model."""
    if min(ids) >= 0 and max(ids) < vocab_size:
        return
    at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise InvalidInputError(
        f"{param}[{at}]", f"{ids[at]} is no token id: the vocabulary is 0 to {vocab_size - 1}"
    )


def _output_schema(asked: SamplingBody) -> dict[str, Any] | None:
    if asked.json_schema is not None:
        return asked.json_schema
    if asked.response_format is None or asked.response_format.type == "text":
        return None
    if asked.response_format.json_schema is None:
        return {"type": "object"}
    return asked.response_format.json_schema.schema_


def tool_call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Schema of one call: ``{"name": <a tool>, "arguments": <by its parameters>}``.

    Definitions that parameters refer to are lifted to the top, under names of their own tool.
    """
    lifted: dict[str, Any] = {}
    calls = []
    for tool in tools:
        name = tool["function"]["name"]
        arguments = tool["function"].get("parameters") or {"type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "arguments": _lift_definitions(arguments, name, lifted),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": lifted} if lifted else schema


def _lift_definitions(parameters: dict[str, Any], tool: str, lifted: dict[str, Any]) -> Any:
    for key in ("$defs", "definitions"):
        for name, definition in parameters.get(key, {}).items():
            lifted[f"{tool}.{name}"] = _with_refs(definition, tool)
    return _with_refs(
        {key: value for key, value in parameters.items() if key not in ("$defs", "definitions")},
        tool,
    )


def _with_refs(schema: Any, tool: str) -> Any:
    if isinstance(schema, list):
        return [_with_refs(each, tool) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _with_refs(value, tool) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        for prefix in ("#/$defs/", "#/definitions/"):
            if reference.startswith(prefix):
                out["$ref"] = f"#/$defs/{tool}.{reference.removeprefix(prefix)}"
    return out
