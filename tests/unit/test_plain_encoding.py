"""Encoding without special tokens, over every kind of tokenizer that models come with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from stateful_sglang.rendering.content import ContentGuard
from stateful_sglang.rendering.plain_encoding import PlainEncoding, plain_encoding
from stateful_sglang.rendering.spellings import protected_tokens
from stateful_sglang.session.errors import InvalidInputError

CORPUS = [
    "the end of a turn and the start of another one",
    "im im_start im_end <|im| <| |> </s> <s> s> </ <unk> TOOL tool_call call",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 <>|/_-[].,:\n",
] * 4
WIDE = "\uff1cnote\uff1e"
"""What NFKC makes a tag of."""
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _trained(model: Any, trainer: Any, before: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    before(tokenizer)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in SPECIALS])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("\n\n")])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: bytes as letters, a start token put first by the post-processor."""

    def before(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer = _trained(models.BPE(), trainer, before)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return tokenizer


def whole_words() -> Tokenizer:
    """Llama 3: words that are in the vocabulary are taken whole, special ones too."""
    tokenizer = byte_level()
    spec = tokenizer.to_str().replace('"ignore_merges":false', '"ignore_merges":true')
    tokenizer = Tokenizer.from_str(spec)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2: spaces become a letter, one is put first, unknown letters become byte tokens."""

    def before(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    spec = json.loads(_trained(model, trainer, before).to_str())
    spec["added_tokens"] = [each for each in spec["added_tokens"] if each["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(spec))


def unigram() -> Tokenizer:
    """T5, XLNet: pieces with scores; special tokens are pieces too."""

    def before(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")

    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    return _trained(models.Unigram(), trainer, before)


def word_piece() -> Tokenizer:
    """BERT: lower case, whole words, and tokens that are looked for after the normaliser."""

    def before(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)

    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>"], show_progress=False
    )
    tokenizer = _trained(models.WordPiece(unk_token="<unk>"), trainer, before)
    tokenizer.add_tokens([AddedToken("<note>", normalized=True)])
    return tokenizer


def flags() -> Tokenizer:
    """Tokens that take the blanks beside them, or stand for whole words only."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("<end>", rstrip=True, normalized=False),
            AddedToken("END", single_word=True, normalized=False),
        ]
    )
    return tokenizer


KINDS = [byte_level, whole_words, byte_fallback, unigram, word_piece, flags]


@cache
def fast(kind: Callable[[], Tokenizer]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=kind())


@cache
def guard_of(tokenizer: PreTrainedTokenizerFast) -> ContentGuard:
    return ContentGuard(tokenizer)


@cache
def plain_encoding_of(tokenizer: PreTrainedTokenizerFast) -> PlainEncoding:
    return plain_encoding(tokenizer, protected_tokens(tokenizer))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return fast(request.param)


@pytest.fixture(scope="module")
def guard(tokenizer: PreTrainedTokenizerFast) -> ContentGuard:
    return guard_of(tokenizer)


SPELLINGS = (*SPECIALS, "<tool_call>", "<mask>", "<end>", "END", "<note>", "<NOTE>", WIDE)
OTHERS = (
    "</",
    "s>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "the",
    "im",
    "_",
    "<|",
    "|>",
    "é",
    "x",
    "<0x0A>",
    "<",
)
PIECES = st.sampled_from([*SPELLINGS, *OTHERS])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_tokens_that_are_meant_are_encoded_as_the_tokenizer_does(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoding = plain_encoding_of(tokenizer)
    # What only a normaliser turns into a token is never meant.
    text = text.replace("<NOTE>", "").replace(WIDE, "")
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.encode(encoding.split(text)) == expected


@settings(deadline=None, max_examples=200)
@given(before=TEXTS, content=TEXTS, after=TEXTS)
def test_content_adds_no_token_to_those_around_it(
    before: str, content: str, after: str, tokenizer: PreTrainedTokenizerFast, guard: ContentGuard
) -> None:
    protected = {token.id for token in protected_tokens(tokenizer)} - {
        tokenizer.backend_tokenizer.token_to_id("<unk>")  # Also what unknown letters become.
    }
    assume("note" not in (before + after).lower())
    text = f"{before} {guard.text(content)} {after}"
    ids = [each for each in guard.encode(text) if each in protected]
    around = [
        each
        for words in (before, after)
        for each in tokenizer.encode(f"x {words} x", add_special_tokens=False)
        if each in protected
    ]
    assert ids == around


@settings(deadline=None, max_examples=100)
@given(content=TEXTS)
def test_text_is_read_back_from_its_tokens(content: str) -> None:
    assume("\n\n" not in content)  # Llama 2's form puts a blank after an added token.
    for kind in (byte_level, byte_fallback):
        tokenizer = fast(kind)
        guard = guard_of(tokenizer)
        ids = guard.encode("a" + guard.text(content) + "b")
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{content}b"


class Slow:
    """A tokenizer in Python, as some models bring along: nothing in it can be copied."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast
        self.added_tokens_decoder = fast.added_tokens_decoder

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens)
        return ids


@settings(deadline=None, max_examples=100)
@given(content=TEXTS)
def test_a_tokenizer_that_cannot_be_copied_encodes_spellings_in_two_pieces(content: str) -> None:
    tokenizer = fast(byte_level)
    guard = ContentGuard(Slow(tokenizer))
    ids = guard.encode(f"<|im_start|>a {guard.text(content)} b<|im_end|>")
    protected = {token.id for token in protected_tokens(tokenizer)}
    ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [each for each in ids if each in protected] == ends
    assert tokenizer.decode(ids) == f"<|im_start|>a {content} b<|im_end|>"


def test_a_spelling_without_another_form_is_refused() -> None:
    class Stubborn(Slow):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [self.fast.convert_tokens_to_ids("<s>")]

    guard = ContentGuard(Stubborn(fast(byte_level)))
    with pytest.raises(InvalidInputError, match="--content-tokens special"):
        guard.encode(guard.text("a <s> b"))


def test_runs_of_blanks_are_ordinary_text() -> None:
    tokenizer = fast(byte_level)
    assert "\n\n" in tokenizer.get_added_vocab()
    encoding = plain_encoding_of(tokenizer)
    assert encoding.encode(["a\n\nb <s>"]).count(tokenizer.get_added_vocab()["\n\n"]) == 1
