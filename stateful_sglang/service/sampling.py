"""How to generate, in our own words; the engine's adapter turns them into SGLang's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_MAX_TOKENS = 1024
"""Most tokens generated where a request names no number."""

ConstraintKind = Literal["json_schema", "regex", "ebnf"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate. What is None is left to the model server's defaults."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must be like, prepared for the engine's compiler and proven to be taken."""

    kind: ConstraintKind
    text: str
    """A schema as JSON, a regular expression, or an EBNF grammar."""
