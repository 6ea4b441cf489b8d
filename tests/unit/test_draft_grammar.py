"""Drafts under a grammar: cut where it forbids them, masked as stepwise decoding would be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar  # noqa: E402
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo  # noqa: E402

from stateful_sglang.runtime.speculation.grammar import cut_and_mask, spread  # noqa: E402

VOCAB = 49_152
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "start": {"type": "integer"}},
    "required": ["path", "start"],
}
CALL = '{"path": "src/main.py", "start": 40}'


@pytest.fixture(scope="module")
def compiled(smollm_tokenizer: Any) -> Any:
    info = TokenizerInfo.from_huggingface(
        smollm_tokenizer, vocab_size=VOCAB, stop_token_ids=[smollm_tokenizer.eos_token_id]
    )
    return GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA))


@pytest.fixture
def grammar(compiled: Any) -> XGrammarGrammar:
    matcher = GrammarMatcher(compiled, max_rollback_tokens=200)
    return XGrammarGrammar(matcher, VOCAB, compiled, None)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def stepwise_mask(grammar: XGrammarGrammar) -> torch.Tensor:
    mask = grammar.allocate_vocab_mask(VOCAB, 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    return mask[0]


def test_a_legal_draft_is_kept_with_the_masks_of_stepwise_decoding(
    grammar: XGrammarGrammar, smollm_tokenizer: Any
) -> None:
    tokens = encode(smollm_tokenizer, CALL)
    chains = [list(tokens)]
    mask = cut_and_mask([grammar], chains, VOCAB)
    assert mask is not None
    assert chains == [tokens]
    assert len(mask.vocab_mask) == 1 + len(tokens)
    for row, token in zip(mask.vocab_mask, [*tokens, None], strict=True):
        assert torch.equal(row, stepwise_mask(grammar))
        if token is not None:
            grammar.accept_token(token)


def test_the_walk_leaves_the_grammar_as_it_was(
    grammar: XGrammarGrammar, smollm_tokenizer: Any
) -> None:
    tokens = encode(smollm_tokenizer, CALL)
    for token in tokens[:3]:
        grammar.accept_token(token)
    before = stepwise_mask(grammar)
    cut_and_mask([grammar], [tokens[3:]], VOCAB)
    cut_and_mask([grammar], [[tokens[0]]], VOCAB)
    assert torch.equal(stepwise_mask(grammar), before)
    assert grammar.accepted_tokens == tokens[:3]


def test_a_draft_is_cut_before_the_first_forbidden_token(
    grammar: XGrammarGrammar, smollm_tokenizer: Any
) -> None:
    tokens = encode(smollm_tokenizer, CALL)
    wrong = encode(smollm_tokenizer, " hello")
    chains = [[*tokens[:2], *wrong, *tokens[2:]]]
    mask = cut_and_mask([grammar], chains, VOCAB)
    assert mask is not None
    assert chains == [tokens[:2]]
    assert len(mask.vocab_mask) == 3


def test_a_draft_is_cut_before_the_end_of_the_grammar(
    grammar: XGrammarGrammar, smollm_tokenizer: Any
) -> None:
    tokens = encode(smollm_tokenizer, CALL)
    chains = [[*tokens, smollm_tokenizer.eos_token_id, tokens[0]]]
    cut_and_mask([grammar], chains, VOCAB)
    assert chains == [tokens]
    assert not grammar.is_terminated()


def test_requests_without_a_grammar_are_neither_cut_nor_masked(
    grammar: XGrammarGrammar, smollm_tokenizer: Any
) -> None:
    tokens = encode(smollm_tokenizer, CALL)
    chains = [[5, 6], [*tokens[:2], 5], []]
    mask = cut_and_mask([None, grammar, None], chains, VOCAB)
    assert mask is not None
    assert chains == [[5, 6], tokens[:2], []]
    rows = mask.vocab_mask
    assert len(rows) == 3 + 3 + 1
    assert (rows[[0, 1, 2, 6]] == -1).all()
    assert all((row != -1).any() for row in rows[3:6])


def test_a_batch_without_grammars_has_no_mask() -> None:
    chains = [[1], [2]]
    assert cut_and_mask([None, None], chains, VOCAB) is None
    assert chains == [[1], [2]]


def test_masks_of_ragged_chains_find_their_rows_among_chains_of_one_width() -> None:
    ragged = torch.arange(1, 7, dtype=torch.int32).view(6, 1)
    rows = spread(ragged, [1, 3, 2], 4)
    assert rows.view(-1).tolist() == [1, -1, -1, -1, 2, 3, 4, -1, 5, 6, -1, -1]
