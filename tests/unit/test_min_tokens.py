"""min_new_tokens forbids the end, except where a grammar allows nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.sampling.penaltylib import BatchedMinNewTokensPenalizer  # noqa: E402

from stateful_sglang.runtime.min_tokens import _make_finite  # noqa: E402

END, VOCABULARY = 2, 5


class Orchestrator:
    """What the penalizer asks of SGLang's, which it holds weakly."""

    device, vocab_size = "cpu", VOCABULARY

    def __init__(self, requests: list[SimpleNamespace]) -> None:
        self._requests = requests

    def reqs(self) -> list[SimpleNamespace]:
        return self._requests


def penalised(logits: torch.Tensor) -> torch.Tensor:
    """Logits of one request that wants at least eight tokens and has none."""
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(min_new_tokens=8, stop_token_ids=None),
        eos_token_ids={END},
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END),
    )
    orchestrator = Orchestrator([request])
    penalizer = BatchedMinNewTokensPenalizer(orchestrator)
    penalizer._prepare()
    _make_finite(None, penalizer)
    penalizer._apply(logits)
    return logits


def test_the_end_is_forbidden_while_anything_else_is_allowed() -> None:
    probabilities = torch.softmax(penalised(torch.full((1, VOCABULARY), -50.0)) / 1e-3, dim=-1)
    assert probabilities[0, END] == 0
    assert torch.isclose(probabilities.sum(), torch.tensor(1.0))


def test_the_end_is_certain_where_a_grammar_forbids_the_rest() -> None:
    logits = penalised(torch.zeros(1, VOCABULARY))
    logits[0, [token for token in range(VOCABULARY) if token != END]] = float("-inf")
    probabilities = torch.softmax(logits / 1e-6, dim=-1)
    assert probabilities[0].tolist() == [0, 0, 1, 0, 0]
