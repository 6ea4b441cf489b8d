"""What the engine bench measures: one cell for each kind of step and its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["prefill", "decode", "verify"]

SPEED_CONTEXT = 128
"""Context of the figures without one in their name: short, so that they tell of the engine rather
than of attention alone."""
VERIFY_CONTEXTS = (128, 2048)


class Cell(NamedTuple):
    """One measured size. A step of it computes ``batch * width`` tokens."""

    kind: Kind
    batch: int
    width: int
    """New tokens of each request: the prompt, 1, or the tokens verified."""
    context: int
    """Tokens each request has in the KV cache before the step."""

    @property
    def name(self) -> str:
        """Short and unique: ``prefill-2048``, ``decode-b4-c128``, ``verify-w8-c2048``."""
        if self.kind == "prefill":
            return f"prefill-{self.width}"
        if self.kind == "decode":
            return f"decode-b{self.batch}-c{self.context}"
        return f"verify-w{self.width}-c{self.context}"

    @property
    def tokens(self) -> int:
        """New tokens of a step."""
        return self.batch * self.width


def prefill(tokens: int) -> Cell:
    """A fresh prompt, alone."""
    return Cell("prefill", 1, tokens, 0)


def decode(batch: int, context: int) -> Cell:
    """One token for each of some requests."""
    return Cell("decode", batch, 1, context)


def verify(width: int, context: int) -> Cell:
    """A pending token and ``width - 1`` drafts of one request, logits of all of them."""
    return Cell("verify", 1, width, context)


@dataclass(frozen=True)
class Plan:
    """What one round measures of each arm."""

    prefills: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    """Pairs of batch and context."""
    verifies: tuple[tuple[int, int], ...]
    """Pairs of width and context."""
    prompts: int
    """Fresh prompts for each length of prefill, at least."""
    tokens: int
    """Tokens decoded by each stream of a decode cell."""

    @property
    def cells(self) -> list[Cell]:
        """In the order of the table."""
        return [
            *(prefill(tokens) for tokens in self.prefills),
            *(decode(batch, context) for batch, context in self.decodes),
            *(verify(width, context) for width, context in self.verifies),
        ]

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """Each decode context with the largest batch that decodes on it."""
        largest: dict[int, int] = {}
        for batch, context in self.decodes:
            largest[context] = max(batch, largest.get(context, 0))
        return list(largest.items())


HEAVY = 32_768
"""Tokens of context over a decode batch from which a cell is measured in the first round only:
filling them takes minutes."""


def plan(quick: bool, first_round: bool) -> Plan:
    """The cells of a round."""
    if quick:
        return Plan(
            prefills=(128, 512, 2048),
            decodes=((1, 128), (4, 128), (16, 128), (1, 2048), (4, 2048)),
            verifies=tuple((w, c) for c in VERIFY_CONTEXTS for w in (1, 2, 4, 8, 16)),
            prompts=3,
            tokens=40,
        )
    decodes = [(batch, context) for context in (128, 2048, 7000) for batch in (1, 4, 16)]
    return Plan(
        prefills=(128, 512, 2048, 7000),
        decodes=tuple((b, c) for b, c in decodes if first_round or b * c < HEAVY // 2),
        verifies=tuple((w, c) for c in (*VERIFY_CONTEXTS, 7000) for w in (1, 2, 4, 8, 16)),
        prompts=3,
        tokens=64,
    )


def all_cells(plans: Sequence[Plan]) -> list[Cell]:
    """The cells of some rounds, each once."""
    return list(dict.fromkeys(cell for one in plans for cell in one.cells))
