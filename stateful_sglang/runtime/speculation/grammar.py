"""Drafts under a grammar: cut where the grammar forbids them, with the masks of what is left.

Both come from one walk of the request's FSM on the host, which leaves the FSM as it was: it
advances only over tokens that were emitted, in SGLang's own result processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from stateful_sglang.attachments.check import Attachment

ATTACHMENTS = (
    Attachment(
        "sglang.srt.constrained.base_grammar_backend.BaseGrammarObject",
        "relies",
        "a draft is walked through the grammar and the walk is taken back",
    ),
    Attachment(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar",
        "relies",
        "rollback(0) empties its record and 200 tokens is its limit: neither is reached",
    ),
)


def is_constrained(grammar: Any) -> bool:
    """Whether a request's next token is limited by its grammar."""
    return grammar is not None and not grammar.finished and not grammar.is_terminated()


def cut_and_mask(
    grammars: Sequence[Any], chains: list[list[int]], vocab_size: int
) -> GrammarMask | None:
    """Cut each chain, in place, before the first token its grammar forbids or ends with.

    Returns:
        The mask of every row that is left to verify, ``[sum(1 + len(chain)), words]`` on the host:
        one row for the pending token and one for each draft of a request, in order. None where no
        request is constrained.
    """
    constrained = [i for i, grammar in enumerate(grammars) if is_constrained(grammar)]
    if not constrained:
        return None
    handle = grammars[constrained[0]]
    blocks: list[torch.Tensor] = []
    for i, grammar in enumerate(grammars):
        block = handle.allocate_vocab_mask(
            vocab_size=vocab_size, batch_size=1 + len(chains[i]), device="cpu"
        )
        if i in constrained:
            chains[i][:] = chains[i][: _walk(grammar, chains[i], block)]
            block = block[: 1 + len(chains[i])]
        blocks.append(block)
    return GrammarMask(handle, torch.cat(blocks))


def _walk(grammar: Any, chain: list[int], mask: torch.Tensor) -> int:
    """Fill `mask` along `chain` as far as the grammar goes; returns how many drafts it allows."""
    grammar.fill_vocab_mask(mask, 0)
    if mask.dtype != torch.int32:
        return 0  # Not a bitmask: a backend that cannot take a walk back either.
    allowed = 0
    for token in chain:
        if not _permits(mask[allowed], token):
            break
        grammar.accept_token(token)
        allowed += 1
        if grammar.is_terminated():
            # What follows the end is not the grammar's; the last token comes by sampling.
            grammar.rollback(1)
            allowed -= 1
            break
        grammar.fill_vocab_mask(mask, allowed)
    if allowed:
        grammar.rollback(allowed)
    return allowed


def _permits(words: torch.Tensor, token: int) -> bool:
    return bool((int(words[token >> 5]) >> (token & 31)) & 1)


def spread(mask: torch.Tensor, lens: list[int], width: int) -> torch.Tensor:
    """Rows of ragged chains at the places they have among chains of one width."""
    spread = mask.new_full((len(lens) * width, mask.shape[1]), -1)
    for i, block in enumerate(mask.split(lens)):
        spread[i * width : i * width + len(block)] = block
    return spread
