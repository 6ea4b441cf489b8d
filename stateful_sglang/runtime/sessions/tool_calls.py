"""Tool calls as SGLang's parsers find them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from stateful_sglang.service.tool_calls import ParsedAnswer, loaded, new_id
from stateful_sglang.session.messages import ToolCall

logger = logging.getLogger(__name__)


def parse_with_sglang(
    raw: str, tools: Sequence[Mapping[str, Any]], parser: str, tokenizer: Any
) -> ParsedAnswer:
    """Calls as SGLang's parser of this name finds them; `raw` keeps its special tokens."""
    try:
        known = [Tool.model_validate(dict(tool)) for tool in tools]
        found = FunctionCallParser(known, parser, tokenizer)
        content, items = found.parse_non_stream(raw)
    except Exception:
        # An answer that a parser stumbles on is still an answer.
        logger.exception("tool call parser %s failed; the answer is returned as text", parser)
        return ParsedAnswer(raw, ())
    calls = tuple(
        ToolCall(new_id(), item.name, loaded(item.parameters)) for item in items if item.name
    )
    return ParsedAnswer(content, calls)
