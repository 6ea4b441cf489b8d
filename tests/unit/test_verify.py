"""Verified text has the distribution of plain sampling, and a biased verifier would be noticed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.layers import sampler as sglang_sampler  # noqa: E402
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo  # noqa: E402
from sglang.srt.sampling.sampling_params import TOP_K_ALL  # noqa: E402

from stateful_sglang.runtime.speculation import verify  # noqa: E402

VOCAB, LENGTH, SAMPLES = 6, 3, 24_000
DRAFT = [2, 1, 3]
"""Likely, less likely, likely under the model below."""


class Settings(NamedTuple):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = TOP_K_ALL
    min_p: float = 0.0
    bias: tuple[float, ...] | None = None


class PlainSampler(sglang_sampler.Sampler):
    """SGLang's sampler without a process group."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.rl_on_policy_target = None
        self.enable_deterministic = False
        self.use_log_softmax_logprob = False
        self.use_ascend_backend = False


@pytest.fixture(autouse=True)
def _pytorch_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(kernel=SimpleNamespace(sampling_backend="pytorch"))
    monkeypatch.setattr(sglang_sampler, "get_exec", lambda: settings)
    monkeypatch.setattr(verify, "sanitize_nan_logits", lambda *_: None)
    monkeypatch.setattr(sglang_sampler, "sanitize_nan_logits", lambda *_: None)


@pytest.fixture
def table() -> torch.Tensor:
    """A model whose next token depends on the last: logits ``[vocab, vocab]``."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(VOCAB, VOCAB, generator=generator)
    for before, after in itertools.pairwise([0, *DRAFT]):
        logits[before, after] += 1.0
    return logits


def batch_info(chosen: list[Settings]) -> SamplingBatchInfo:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(s, name) for s in chosen], dtype=dtype)

    biased = any(s.bias for s in chosen)
    rows = [s.bias or (0.0,) * VOCAB for s in chosen]
    return SamplingBatchInfo(
        temperatures=column("temperature", torch.float).view(-1, 1),
        top_ps=column("top_p", torch.float),
        top_ks=column("top_k", torch.int32),
        min_ps=column("min_p", torch.float),
        is_all_greedy=all(s.top_k <= 1 for s in chosen),
        is_any_greedy=any(s.top_k <= 1 for s in chosen),
        need_top_p_sampling=any(s.top_p != 1.0 for s in chosen),
        need_top_k_sampling=any(s.top_k != TOP_K_ALL for s in chosen),
        need_min_p_sampling=any(s.min_p > 0 for s in chosen),
        max_top_k=max(s.top_k for s in chosen)
        if all(s.top_k < TOP_K_ALL for s in chosen)
        else None,
        vocab_size=VOCAB,
        logit_bias=torch.tensor(rows) if biased else None,
        device="cpu",
    )


def verified(
    table: torch.Tensor,
    chosen: list[Settings],
    contexts: list[int],
    chains: list[list[int]],
    *,
    at_once: bool,
    emit: Callable[[int, int], int] = verify._keep_sample,
) -> list[list[int]]:
    """One verify step of requests whose pending tokens are `contexts`."""
    lens = [1 + len(chain) for chain in chains]
    starts = [0, *itertools.accumulate(lens)][:-1]
    inputs = [token for c, chain in zip(contexts, chains, strict=True) for token in (c, *chain)]
    logits, info = table[inputs].clone(), batch_info(chosen)
    sampler: Any = PlainSampler()
    verify.bias_rows(logits, info, sampler, None, lens, starts)
    positions = torch.zeros(len(inputs), dtype=torch.int64)
    draw = verify.RowSampler(sampler, logits, info, positions, lens, at_once=at_once)
    return verify.sample_and_match(chains, starts, draw, emit)


def continuations(
    table: torch.Tensor, setting: Settings, *, at_once: bool, emit: Any = verify._keep_sample
) -> Counter[tuple[int, ...]]:
    """SAMPLES continuations of LENGTH tokens after token 0, each drafted anew at every step."""
    texts: list[list[int]] = [[] for _ in range(SAMPLES)]
    while unfinished := [text for text in texts if len(text) < LENGTH]:
        emitted = verified(
            table,
            [setting] * len(unfinished),
            [text[-1] if text else 0 for text in unfinished],
            [DRAFT[len(text) :] for text in unfinished],
            at_once=at_once,
            emit=emit,
        )
        for text, tokens in zip(unfinished, emitted, strict=True):
            text += tokens
    return Counter(tuple(text[:LENGTH]) for text in texts)


def distribution(table: torch.Tensor, setting: Settings) -> np.ndarray:
    """Next-token probabilities ``[vocab, vocab]`` under a setting, written down independently."""
    logits = table.double().numpy() + np.array(setting.bias or (0.0,) * VOCAB)
    weights = np.exp(logits / setting.temperature)
    probs = weights / weights.sum(1, keepdims=True)
    kept = np.zeros_like(probs)
    for row, out in zip(probs, kept, strict=True):
        order = np.argsort(-row)
        before = 0.0
        for rank, token in enumerate(order):
            if rank < setting.top_k and before <= setting.top_p:
                out[token] = row[token]
            before += row[token]
        out[out < row.max() * setting.min_p] = 0.0
    return kept / kept.sum(1, keepdims=True)


def chi_square_p(counts: Counter[tuple[int, ...]], probs: np.ndarray) -> float:
    """P-value of the counts; cells that expect fewer than 5 are pooled, impossible ones fatal."""
    observed, expected, rest = [], [], [0.0, 0.0]
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        p = np.prod([probs[a, b] for a, b in itertools.pairwise((0, *text))])
        if p == 0:
            assert counts[text] == 0, f"{text} is impossible but was emitted"
        elif p * SAMPLES < 5:
            rest = [rest[0] + counts[text], rest[1] + p * SAMPLES]
        else:
            observed.append(counts[text])
            expected.append(p * SAMPLES)
    if rest[1] > 0:
        observed.append(rest[0])
        expected.append(rest[1])
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(
    ("setting", "at_once"),
    [
        (Settings(), False),
        (Settings(), True),
        (Settings(temperature=0.7), False),
        (Settings(top_p=0.8), False),
        (Settings(top_k=3), False),
        (Settings(min_p=0.2), False),
        (Settings(temperature=1.3, top_p=0.9, top_k=4, min_p=0.1), False),
        (Settings(temperature=1.3, top_p=0.9, top_k=4, min_p=0.1), True),
        (Settings(bias=(0.0, -2.0, 1.0, 0.0, 0.5, 0.0)), False),
    ],
    ids=str,
)
def test_verified_text_has_the_models_distribution(
    table: torch.Tensor, setting: Settings, at_once: bool
) -> None:
    torch.manual_seed(11)
    counts = continuations(table, setting, at_once=at_once)
    assert chi_square_p(counts, distribution(table, setting)) > 1e-3


@pytest.mark.parametrize("kept", [0.05, 0.3, 1.0])
def test_a_verifier_that_keeps_some_refuted_drafts_is_noticed(
    table: torch.Tensor, kept: float
) -> None:
    torch.manual_seed(11)
    rng = np.random.default_rng(5)

    def prefer_the_draft(sampled: int, drafted: int) -> int:
        return drafted if rng.random() < kept else sampled

    counts = continuations(table, Settings(), at_once=False, emit=prefer_the_draft)
    assert chi_square_p(counts, distribution(table, Settings())) < 1e-6


@pytest.mark.parametrize("at_once", [False, True])
def test_greedy_emits_the_argmax_path_and_one_token_beyond_it(
    table: torch.Tensor, at_once: bool
) -> None:
    greedy = Settings(top_k=1)
    best = table.argmax(1).tolist()
    path = [best[0], best[best[0]], best[best[best[0]]]]
    wrong = [path[0], (path[1] + 1) % VOCAB, 0]
    emitted = verified(table, [greedy] * 3, [0, 0, 0], [path[:2], wrong, []], at_once=at_once)
    assert emitted == [path, path[:2], path[:1]]


def test_requests_of_one_batch_keep_their_own_settings(table: torch.Tensor) -> None:
    torch.manual_seed(3)
    best = table.argmax(1).tolist()
    count = 2000
    chosen = [Settings(top_k=1), Settings(temperature=5.0)] * count
    chains = [[best[0]], []] * count
    emitted = verified(table, chosen, [0] * 2 * count, chains, at_once=False)
    assert all(tokens == [best[0], best[best[0]]] for tokens in emitted[::2])
    assert len({tuple(tokens) for tokens in emitted[1::2]}) == VOCAB


def test_a_batchs_bound_on_top_k_holds_for_its_rows(table: torch.Tensor) -> None:
    torch.manual_seed(3)
    count = 500
    emitted = verified(
        table,
        [Settings(top_k=1), Settings(top_k=3)] * count,
        [0] * 2 * count,
        [[]] * 2 * count,
        at_once=False,
    )
    likeliest = table[0].argsort(descending=True).tolist()
    assert {token for tokens in emitted[::2] for token in tokens} == {likeliest[0]}
    assert {token for tokens in emitted[1::2] for token in tokens} == set(likeliest[:3])


def test_a_penalty_counts_for_the_first_row_of_its_request_only(table: torch.Tensor) -> None:
    info = batch_info([Settings(), Settings()])
    info.acc_additive_penalties = torch.tensor([[0.0] * VOCAB, [-9.0] * VOCAB])
    logits = table[[0, 2, 0, 0]].clone()
    verify.bias_rows(logits, info, None, None, [3, 1], [0, 3])
    assert torch.equal(logits[:3], table[[0, 2, 0]])
    assert torch.equal(logits[3], table[0] - 9.0)
