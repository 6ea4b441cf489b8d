"""Encoding in which content can't spell special or added tokens."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stateful_sglang.rendering.spellings import AddedToken, pattern_of
from stateful_sglang.session.errors import InvalidInputError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""What a model with byte fallback calls a byte; it looks these up by name."""


class PlainEncoding(Protocol):
    """Encodes text in pieces, of which some are tokens by decree and the rest never are."""

    def split(self, text: str) -> list[str | int]:
        """Text that may hold tokens, as text and the ids of the tokens spelled in it."""
        ...

    def encode(self, segments: Sequence[str | int]) -> list[int]:
        """Token ids of text and tokens together."""
        ...


def plain_encoding(tokenizer: Any, tokens: Sequence[AddedToken]) -> PlainEncoding:
    """The encoding of a Hugging Face tokenizer without `tokens`, except where they are meant."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return _CutEncoding(tokenizer, tokens)
    return _SealedEncoding(backend, tokens)


class _Splitter:
    """Finds tokens as a tokenizer does."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._pattern = pattern_of(token.spelling for token in tokens)
        self._tokens = {token.spelling: token for token in tokens}

    def split(self, text: str) -> list[str | int]:
        """Text as text and the ids of the tokens spelled in it."""
        segments: list[str | int] = []
        start = 0
        for found in self._pattern.finditer(text):
            token = self._tokens[found[0]]
            if token.single_word and _inside_word(text, found.start(), found.end()):
                continue
            segments += [text[start : found.start()], token.id]
            start = found.end()
        return [*segments, text[start:]]


class _SealedEncoding(_Splitter):
    """A copy of the tokenizer in which each token has a spelling that nobody can guess.

    The copy differs in nothing else, so text is cut into words and normalised as in the original,
    beside a special token too.
    """

    def __init__(self, backend: Any, tokens: Sequence[AddedToken]) -> None:
        super().__init__(tokens)
        nonce = secrets.token_hex(12)
        self._seals = {token.id: f"{nonce}{token.id:08x}" for token in tokens}
        spec = json.loads(backend.to_str())
        spec.update(truncation=None, padding=None, post_processor=None)
        taken = {token.spelling: self._seals[token.id] for token in tokens}
        ids: dict[str, int] = {}
        for token in spec["added_tokens"]:
            if token["content"] in taken:
                # Whether it stands alone, `split` has decided; seals are words of one kind.
                token.update(content=taken[token["content"]], single_word=False)
            ids[token["content"]] = token["id"]
        _forget(spec["model"], taken)
        self._sealed = type(backend).from_str(json.dumps(spec))
        # New spellings have new numbers.
        self._ids = {self._sealed.token_to_id(spelling): number for spelling, number in ids.items()}

    def encode(self, segments: Sequence[str | int]) -> list[int]:
        """Token ids of text and tokens together."""
        text = "".join(each if isinstance(each, str) else self._seals[each] for each in segments)
        ids = self._sealed.encode(text, add_special_tokens=False).ids
        return [self._ids.get(each, each) for each in ids]


class _CutEncoding(_Splitter):
    """For tokenizers that can't be copied: spellings in content are encoded in two pieces."""

    def __init__(self, tokenizer: Any, tokens: Sequence[AddedToken]) -> None:
        super().__init__(tokens)
        self._tokenizer = tokenizer
        self._numbers = frozenset(token.id for token in tokens)

    def encode(self, segments: Sequence[str | int]) -> list[int]:
        """Token ids of text and tokens together.

        Raises:
            InvalidInputError: A spelling became its token all the same.
        """
        ids: list[int] = []
        text = ""
        for segment in [*segments, None]:
            if isinstance(segment, str):
                text += segment
                continue
            ids += self._as_text(text)
            text = ""
            if segment is not None:
                ids.append(segment)
        return ids

    def _as_text(self, text: str) -> list[int]:
        cuts = [found.start() + 1 for found in self._pattern.finditer(text)]
        ids: list[int] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._tokenizer.encode(text[start:stop], add_special_tokens=False)
        if not self._numbers.isdisjoint(ids):
            raise InvalidInputError(
                "messages",
                "a message spells a special token, and this model's tokenizer has no other form "
                "for it; leave it out, or start the server with --content-tokens special",
            )
        return ids


def _forget(model: dict[str, Any], taken: Mapping[str, str]) -> None:
    """Make `taken` strings nothing that the model of a tokenizer can arrive at from text."""
    unknown = model.get("unk_token")
    gone = {each for each in taken if each != unknown and not _BYTE_TOKEN.fullmatch(each)}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {
            f"{taken[piece]}gone" if piece in gone else piece: number
            for piece, number in vocabulary.items()
        }
    elif isinstance(vocabulary, list):
        model["vocab"] = [
            [f"{taken[piece]}gone" if piece in gone else piece, score]
            for piece, score in vocabulary
        ]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, taken)]


def _touches(merge: str | Sequence[str], taken: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in taken or right in taken or left + right in taken


def _inside_word(text: str, start: int, stop: int) -> bool:
    beside = text[max(0, start - 1) : start] + text[stop : stop + 1]
    return any(letter.isalnum() or letter == "_" for letter in beside)
