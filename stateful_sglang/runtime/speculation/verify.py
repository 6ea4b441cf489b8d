"""Verification by sampling: every verified row is sampled as plain decoding would sample it.

A draft is accepted while the sample equals it, and the first sample that differs is emitted in its
place. So every emitted token is a sample of the model's own distribution after the tokens before
it, whatever was drafted; for a deterministic draft this is also the acceptance rate of rejection
sampling (Leviathan et al. 2023), since both accept token t with probability p(t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.async_probe import sanitize_nan_logits

from stateful_sglang.attachments.check import Attachment

ATTACHMENTS = (
    Attachment(
        "sglang.srt.layers.sampler.Sampler.forward",
        "relies",
        "verified rows are sampled by the sampler of plain decoding",
    ),
    Attachment(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo",
        "relies",
        "its rows are picked for the verified rows, its biases applied as before plain sampling",
    ),
    Attachment(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        "relies",
        "what plain decoding does around the sampler: nothing that verification would have to "
        "repeat but watermarks, which are refused",
    ),
    Attachment(
        "sglang.srt.speculative.spec_sampling_mask.validate_spec_sampling_mask_request",
        "relies",
        "requests for the sampling's support are refused beside drafts: no row of it is picked",
    ),
    Attachment(
        "sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits",
        "relies",
        "the order of biases that verification repeats for every row",
    ),
    Attachment(
        "sglang.srt.constrained.base_grammar_backend.GrammarMask",
        "relies",
        "masks of several rows and how they are applied",
    ),
    Attachment(
        "sglang.srt.layers.logits_processor.LogitsProcessorOutput",
        "relies",
        "what the sampler is given",
    ),
    Attachment(
        "sglang.srt.utils.async_probe.sanitize_nan_logits",
        "relies",
        "what plain decoding does to broken logits first",
    ),
)

Draw = Callable[[list[int], list[int]], list[int]]
"""Samples one token for each of some rows, given the requests they belong to."""


def _keep_sample(sampled: int, _drafted: int) -> int:
    return sampled


def sample_and_match(
    chains: Sequence[Sequence[int]],
    row_starts: Sequence[int],
    draw: Draw,
    emit: Callable[[int, int], int] = _keep_sample,
) -> list[list[int]]:
    """Emit one token a row while samples equal the drafts.

    Args:
        chains: Drafts of each request; none is a plain step of that request.
        row_starts: First row of each request: the one that follows its pending token.
        draw: Samples rows. Asked only for rows whose drafts so far were all accepted.
        emit: Token to emit for a sample and the draft it is compared with. Anything but the sample
            breaks the distribution; tests use that to see that they would notice.

    Returns:
        The emitted tokens of each request: its accepted drafts and one more.
    """
    emitted: list[list[int]] = [[] for _ in chains]
    alive = list(range(len(chains)))
    depth = 0
    while alive:
        tokens = draw([row_starts[i] + depth for i in alive], alive)
        still = []
        for i, token in zip(alive, tokens, strict=True):
            if depth < len(chains[i]):
                drafted = chains[i][depth]
                token = emit(token, drafted)
                if token == drafted:
                    still.append(i)
            emitted[i].append(token)
        alive = still
        depth += 1
    return emitted


def bias_rows(
    logits: torch.Tensor,
    info: SamplingBatchInfo,
    sampler: Any,
    mask: GrammarMask | None,
    verify_lens: Sequence[int],
    row_starts: Sequence[int],
) -> None:
    """Apply to ``logits [rows, vocab]``, in place, what plain decoding applies before it samples.

    Penalties and custom processors depend on the tokens so far, so a request that has them drafts
    nothing and only its first row counts; bias and grammar hold for every row.
    """
    sanitize_nan_logits(logits, "verify: next_token_logits")
    first = torch.tensor(row_starts, device=logits.device)
    if info.acc_additive_penalties is not None or info.acc_scaling_penalties is not None:
        rows = logits[first]
        info._apply_pre_grammar_logits_transforms(rows)
        logits[first] = rows
    if mask is not None:
        mask.apply(logits)
    if info.logit_bias is not None:
        lens = torch.tensor(verify_lens, device=logits.device)
        logits.add_(info.logit_bias.repeat_interleave(lens, dim=0))
    if info.has_custom_logit_processor:
        logits[first] = sampler._preprocess_logits(logits[first], info)


class RowSampler:
    """Plain decoding's sampler over picked rows of a verify step's logits.

    Greedy rows are settled in one pass. Sampled ones are drawn along the accepted path only, or all
    in one pass (`at_once`) where a row costs less than a round trip to the device.
    """

    def __init__(
        self,
        sampler: Any,
        logits: torch.Tensor,
        info: SamplingBatchInfo,
        positions: torch.Tensor,
        verify_lens: Sequence[int],
        *,
        at_once: bool,
    ) -> None:
        """`logits` ``[rows, vocab]`` are biased already and stay as they are."""
        self._sampler = sampler
        self._logits = logits
        self._info = info
        self._positions = positions
        self._settled: list[int] | None = None
        if info.is_all_greedy:
            self._settled = torch.argmax(logits, dim=-1).tolist()
        elif at_once:
            requests = [i for i, count in enumerate(verify_lens) for _ in range(count)]
            self._settled = self._sample(list(range(len(logits))), requests)

    def __call__(self, rows: list[int], requests: list[int]) -> list[int]:
        """A token for each of `rows`."""
        if self._settled is not None:
            return [self._settled[row] for row in rows]
        return self._sample(rows, requests)

    def _sample(self, rows: list[int], requests: list[int]) -> list[int]:
        device = self._logits.device
        picked = torch.tensor(rows, device=device)
        tokens: torch.Tensor = self._sampler(
            # The sampler writes into what it is given.
            LogitsProcessorOutput(next_token_logits=self._logits[picked]),
            rows_of(self._info, torch.tensor(requests, device=device)),
            False,
            [],
            [],
            self._positions[picked],
        )
        return [int(token) for token in tokens.tolist()]


def rows_of(info: SamplingBatchInfo, requests: torch.Tensor) -> SamplingBatchInfo:
    """Sampling settings with one row for each of `requests`; biases are left out as applied.

    `max_top_k` bounds the whole batch, hence any of its rows; watermarks are refused at start.
    """
    seed = info.sampling_seed
    return dataclasses.replace(
        info,
        temperatures=info.temperatures[requests],
        top_ps=info.top_ps[requests],
        top_ks=info.top_ks[requests],
        min_ps=info.min_ps[requests],
        sampling_seed=None if seed is None else seed[requests],
        acc_additive_penalties=None,
        acc_scaling_penalties=None,
        logit_bias=None,
        has_custom_logit_processor=False,
        custom_logit_processor=None,
        custom_params=None,
        watermark_keys=None,
        watermark_context_windows=None,
        watermark_enabled=None,
        watermark_candidates_host=None,
        has_watermark_candidates=False,
    )
