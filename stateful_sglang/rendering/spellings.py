"""Which strings a tokenizer turns into special or added tokens, and finding them in text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_BLANK = " \t\r\n\u2581"
"""Whitespace, SentencePiece's mark for it included."""


class AddedToken(NamedTuple):
    """One token that a tokenizer finds in text before its model sees the text."""

    id: int
    spelling: str
    single_word: bool
    """Found only where no letter, digit or underscore stands beside it."""
    normalized: bool
    """Looked for in normalised text, so other spellings may become it too."""


def protected_tokens(tokenizer: Any) -> tuple[AddedToken, ...]:
    """The special and added tokens that content must not become.

    Runs of whitespace, which some tokenizers have as added tokens, are ordinary text.
    """
    known: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(
        AddedToken(int(number), token.content, bool(token.single_word), bool(token.normalized))
        for number, token in known.items()
        if token.content.strip(_BLANK)
    )


def pattern_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """An expression that finds the leftmost, then longest of `spellings`.

    A tree of common beginnings: an alternation of thousands would be tried one by one at every
    ``<`` of a web page.
    """
    tree: dict[str, Any] = {}
    for spelling in spellings:
        node = tree
        for letter in spelling:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_expression(tree) if tree else r"(?!)")


def _expression(node: dict[str, Any]) -> str:
    # Chains of single letters are walked, not recursed into: spellings may be long.
    text = ""
    while len(node) == 1 and "" not in node:
        ((letter, node),) = node.items()
        text += re.escape(letter)
    branches = [re.escape(letter) + _expression(after) for letter, after in node.items() if letter]
    if not branches:
        return text
    ending = "?" if "" in node else ""
    return f"{text}(?:{'|'.join(branches)}){ending}"


class Edges:
    """Ends of text that could become a spelling together with what stands beside them."""

    def __init__(self, spellings: Iterable[str]) -> None:
        spellings = list(spellings)
        self._longest = max(map(len, spellings), default=0) - 1
        cuts = [(each[:at], each[at:]) for each in spellings for at in range(1, len(each))]
        # Of letters and digits alone every other word would be one.
        self._heads = {head for head, _ in cuts if not head.isalnum()}
        self._tails = {tail for _, tail in cuts if not tail.isalnum()}
        self._inner = {inner for each in spellings for inner in _inner_parts(each)}

    def is_inner(self, text: str) -> bool:
        """Whether `text` lacks only brackets and bars to be a spelling."""
        return text in self._inner

    def head(self, text: str) -> int:
        """Characters at the end of `text` with which a spelling may begin."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return next((size for size in sizes if text[-size:] in self._heads), 0)

    def tail(self, text: str) -> int:
        """Characters at the beginning of `text` with which a spelling may end."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return next((size for size in sizes if text[:size] in self._tails), 0)


def _inner_parts(spelling: str) -> set[str]:
    """`spelling` without some or all of what stands around its letters."""
    letters = [at for at, letter in enumerate(spelling) if letter.isalnum()]
    if not letters:
        return set()
    starts, stops = range(letters[0] + 1), range(letters[-1] + 1, len(spelling) + 1)
    return {spelling[start:stop] for start in starts for stop in stops} - {spelling}
