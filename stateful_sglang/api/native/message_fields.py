"""Fields of messages as SDKs dump them: which are taken, which are ignored, which are refused.

``model_dump()`` of a reply writes every field the SDK knows, and clients send that back as history.
A field that is null or empty says nothing, so it is dropped whatever its name. One that carries
something is known, or listed here as ignored with the reason, or refused by name: nothing that
a client meant is lost in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_BOOKKEEPING = "the sender's own bookkeeping"
_REASONING = (
    "templates drop the reasoning of earlier answers, and a session keeps its own; to have it in "
    "the prompt, write it into the content as <think>...</think>"
)
_CACHING = "a session's prefix is always kept; there is nothing to ask for"

IGNORED_FIELDS: Mapping[str, Mapping[str, str]] = {
    "message": {
        "annotations": "citations of the text, which no chat template renders",
        "cache_control": _CACHING,
        "id": _BOOKKEEPING,
        "parsed": "the content again, parsed by the SDK",
        "provider_specific_fields": _BOOKKEEPING,
        "reasoning": _REASONING,
        "reasoning_content": _REASONING,
        "reasoning_details": _REASONING,
        "thinking_blocks": _REASONING,
    },
    "part": {
        "annotations": "citations of the text, which no chat template renders",
        "cache_control": _CACHING,
        "citations": "citations of the text, which no chat template renders",
    },
    "tool_call": {
        "cache_control": _CACHING,
        "index": "calls are in the order of the list",
        "provider_specific_fields": _BOOKKEEPING,
    },
    "function": {
        "parsed_arguments": "the arguments again, parsed by the SDK",
        "provider_specific_fields": _BOOKKEEPING,
    },
    "tool": {"cache_control": _CACHING},
}
"""Fields that are accepted and have no effect, with the reason: by the object that has them
(a message, a part of its content, one of its tool calls, that call's function, a tool's definition)
and by name. The documentation of the routes lists the same."""


def cleaned(
    kind: str, fields: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Drop what says nothing.

    Args:
        kind: What `fields` are of, a key of `IGNORED_FIELDS`.
        known: Names that the object has. Their null is dropped too, their empty value kept.

    Returns:
        The fields that say something, and the names among them that are unknown.
    """
    kept = {
        name: value
        for name, value in fields.items()
        if value is not None
        and (name in known or (name not in IGNORED_FIELDS[kind] and not _is_empty(value)))
    }
    return kept, [name for name in kept if name not in known]


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value
