"""The schema of one tool call, put together from what each tool says of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stateful_sglang.grammar.conjunctions import Conjunctions
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.references import Definitions

NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
"""Of a tool without `parameters`: its arguments are exactly ``{}``."""


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConstraintError` where parameters are no schema of their own.

    What a grammar can't follow is no error here: a model may call such a tool unconstrained.
    """
    definitions = Definitions()
    for index, tool in enumerate(tools):
        _parameters(tool, index, definitions)


def tool_call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Schema of one call: ``{"name": <a tool>, "arguments": <by its parameters>}``.

    Args:
        tools: In OpenAI's form, at least one.

    Raises:
        ConstraintError: Parameters that no grammar can follow; `tool` says whose.
    """
    definitions = Definitions()
    calls = []
    for index, tool in enumerate(tools):
        parameters = _parameters(tool, index, definitions)
        try:
            if definitions.unsupported:
                raise definitions.unsupported[0]
            Conjunctions(definitions.schemas).document(parameters)
        except ConstraintError as error:
            error.tool = index
            raise
        call = {"name": {"enum": [tool["function"]["name"]]}, "arguments": parameters}
        calls.append(
            {
                "type": "object",
                "properties": call,
                "required": list(call),
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = Conjunctions(definitions.schemas).document({"anyOf": calls})
    return whole


def _parameters(tool: Mapping[str, Any], index: int, definitions: Definitions) -> Any:
    parameters = tool["function"].get("parameters")
    if not parameters:
        return NO_ARGUMENTS
    try:
        return {"allOf": [{"type": "object"}, definitions.add(parameters)]}
    except ConstraintError as error:
        error.tool = index
        raise
