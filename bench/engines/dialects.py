"""How each engine is asked for a greedy continuation of token ids, and how it tells of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Dialect(Protocol):
    """How an engine is asked for a greedy continuation that ignores end tokens."""

    path: str

    def body(self, prompt: Sequence[int], max_tokens: int, slot: int) -> dict[str, Any]:
        """The JSON of a streaming request; `slot` numbers requests that run at once."""

    def tokens(self, event: dict[str, Any], before: int) -> int:
        """Tokens generated so far by a streamed event, when it was `before` without it."""


class SGLangDialect:
    """SGLang's native route."""

    path = "/generate"

    def body(self, prompt: Sequence[int], max_tokens: int, slot: int) -> dict[str, Any]:
        """See `Dialect`."""
        return {
            "input_ids": list(prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_tokens,
                "ignore_eos": True,
            },
            "stream": True,
        }

    def tokens(self, event: dict[str, Any], before: int) -> int:
        """See `Dialect`."""
        return int(event["meta_info"]["completion_tokens"])


class OpenAIDialect:
    """The completions route of vLLM, which takes token ids and counts tokens in every event."""

    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        self.model = model

    def body(self, prompt: Sequence[int], max_tokens: int, slot: int) -> dict[str, Any]:
        """See `Dialect`."""
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    def tokens(self, event: dict[str, Any], before: int) -> int:
        """See `Dialect`."""
        usage = event.get("usage")
        return int(usage["completion_tokens"]) if usage else before


class LlamaCppDialect:
    """llama.cpp's native route. A slot keeps its last prompt's KV, so slots are named."""

    path = "/completion"

    def body(self, prompt: Sequence[int], max_tokens: int, slot: int) -> dict[str, Any]:
        """See `Dialect`."""
        return {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "id_slot": slot,
            "return_tokens": True,
            "stream": True,
        }

    def tokens(self, event: dict[str, Any], before: int) -> int:
        """See `Dialect`."""
        if event.get("stop"):
            return int(event.get("tokens_predicted", before))
        return before + len(event.get("tokens", ()))
