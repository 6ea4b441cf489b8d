"""Prompts: random tokens that no cache has seen, passages of a wanted length, sampled texts."""

from __future__ import annotations

import random
from typing import Any

_TEXT = "the parser reads a token and the tree keeps its node while an agent waits for its tool"
_WORDS = _TEXT.split()

SAMPLED = (
    "red blue green red blue green red blue",
    '{"name": "read", "path": "a.py"}\n{"name": "read", "path": "b.py"}\n{"name": "read", "path":',
    "The cat sat on the mat. The dog sat on the log. The cat sat on the",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a",
)
"""Beginnings that go on in several likely ways, of which drafts find some."""

_DELTAS = (
    '{"name": "search", "arguments": {"pattern": "def ", "path": "src/tree.py"}}',
    '{"name": "read", "arguments": {"path": "src/tree.py", "first": 1, "last": 40}}',
    "The result is below.",
    "Count the lines of every file and report the total.",
    "once upon a time there was a small engine that could",
    "<tool_response>42 lines</tool_response>",
)

SPECIAL = 100
"""Token ids below this, and as many at the end of a vocabulary, may mean something to an engine."""


def random_ids(rng: random.Random, length: int, vocabulary: int) -> list[int]:
    """Random ordinary tokens of a vocabulary of that many."""
    return [rng.randrange(SPECIAL, vocabulary - SPECIAL) for _ in range(length)]


def passage(number: int, tokens: int) -> str:
    """About ``tokens`` tokens of text that is different for every number."""
    words = [_WORDS[(i * (number + 3) + i // 7) % len(_WORDS)] for i in range(tokens - 4)]
    return f"Step {number}: " + " ".join(words)


def random_delta(rng: random.Random, tokenizer: Any, first: bool) -> list[int]:
    """Text that repeats itself, plain text, or random token ids: 1 to about 200 tokens."""
    kind = rng.random()
    if kind < 0.5:
        text = "\n".join(rng.choice(_DELTAS) for _ in range(rng.randint(1, 8 if first else 4)))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if kind < 0.8:
        said = rng.choice(_DELTAS)
        text = f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [rng.randrange(20, tokenizer.vocab_size) for _ in range(rng.randint(1, 60))]
