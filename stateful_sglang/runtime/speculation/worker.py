"""The draft worker: looks drafts up, has SGLang's model verify them, decodes plainly without.

A step in which no request drafts is SGLang's own decode. Otherwise the pending token and the drafts
of each request are one verify step: on the CPU ragged, so that a request without a draft costs one
row; on CUDA all of one width, because the captured graphs and most attention backends know only
one, the rest filled with tokens that are never accepted.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_device, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.draft import sources
from stateful_sglang.draft.cost import CPU_COST, FULL_WIDTH_COST
from stateful_sglang.draft.indexes import DraftIndexes
from stateful_sglang.runtime.options import Options
from stateful_sglang.runtime.speculation import eligibility as draft_eligibility
from stateful_sglang.runtime.speculation import grammar as draft_grammar
from stateful_sglang.runtime.speculation import verify
from stateful_sglang.runtime.speculation.verify_input import LookupInput, LookupVerifyInput

logger = logging.getLogger(__name__)

ATTACHMENTS = (
    Attachment(
        "sglang.srt.speculative.base_spec_worker.BaseSpecWorker",
        "subclass",
        "the worker that looks drafts up and verifies them",
    ),
    Attachment(
        "sglang.srt.managers.scheduler.Scheduler._forward_isolation",
        "relies",
        "what the worker changes in a batch is undone after the step",
    ),
    Attachment(
        "sglang.srt.managers.scheduler_components.batch_result_processor."
        "SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        "relies",
        "reads the emitted tokens with the stride that the result states",
    ),
    Attachment(
        "sglang.srt.speculative.eagle_utils.eagle_prepare_for_decode",
        "relies",
        "reserves the slots that a step of the worker writes",
    ),
    Attachment(
        "sglang.srt.layers.logprob_processor.compute_spec_logprobs",
        "relies",
        "log-probabilities of emitted tokens",
    ),
    *draft_grammar.ATTACHMENTS,
    *verify.ATTACHMENTS,
    Attachment(
        "sglang.srt.managers.utils.GenerationBatchResult",
        "relies",
        "what a step answers the scheduler with",
    ),
    Attachment(
        "sglang.srt.runtime_context.get_device",
        "relies",
        "the device of the worker's tensors",
    ),
    Attachment(
        "sglang.srt.runtime_context.get_spec",
        "relies",
        "how many tokens a verify step has at most",
    ),
    Attachment(
        "sglang.srt.configs.hybrid_arch.mambaish_config",
        "relies",
        "models whose state cannot be rolled back draft nothing",
    ),
)


class _Step(NamedTuple):
    """A verify step, laid out one request after the other."""

    chains: list[list[int]]
    verify_lens: list[int]
    row_starts: list[int]
    mask: GrammarMask | None


class PromptLookupWorker(BaseSpecWorker):
    """Speculative worker without a draft model, on SGLang's synchronous V2 schedule.

    Every decode step, drafted or plain, returns `accept_lens`, so SGLang's `spec_verify_ct` counts
    all decode steps of a request: tokens a step are (generated - 1) / `spec_verify_ct`, the first
    token being the prefill's.
    """

    emit = staticmethod(verify._keep_sample)
    """What becomes of a sample; replaced only to see that a biased verifier is noticed."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        super().__init__()
        self._target_worker = target_worker
        self.model_runner = target_worker.model_runner
        self.device = get_device().device
        self._width = get_spec().speculative_num_draft_tokens
        self._one_width = self.device != "cpu"
        config = Options.from_env() or Options()
        self.indexes = DraftIndexes(
            sources.chosen(config.draft),
            max_draft=self._width - 1,
            cost=FULL_WIDTH_COST if self._one_width else CPU_COST,
        )
        self._refusal = draft_eligibility.why_never(self.model_runner)
        if self._refusal is not None:
            logger.warning("no drafts for this model: it has %s", self._refusal)

    @property
    def draft_worker(self) -> None:
        """There is no draft model."""
        return

    def alloc_memory_pool(self, **_pools: Any) -> None:
        """The target's pools exist from now on."""
        self.req_to_token_pool, self.token_to_kv_pool_allocator = (
            self._target_worker.get_memory_pool()
        )

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        """A request left for good; its session's index stays."""
        self.indexes.forget(rid)

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish: Any = None, pp_proxy_tensors: Any = None
    ) -> GenerationBatchResult:
        """One step of the batch: prefill, plain decode, or verification."""
        if not batch.forward_mode.is_decode():
            result = self._target_worker.forward_batch_generation(
                batch, pp_proxy_tensors=pp_proxy_tensors
            )
            result.new_seq_lens = batch.seq_lens
            result.next_draft_input = LookupInput()
            return result
        chains = self._draft(batch)
        self.indexes.end_step([req.rid for req in batch.reqs])
        always = self._must_verify()
        mask = None
        if batch.has_grammar and (always or any(chains)):
            mask = draft_grammar.cut_and_mask(
                [req.grammar for req in batch.reqs], chains, batch.sampling_info.vocab_size
            )
        if always or any(chains):
            return self._verify(batch, chains, mask)
        return self._decode(batch)

    def _must_verify(self) -> bool:
        """Whether a step without drafts is a verify step all the same.

        SGLang's graph runner is captured for verify steps and does not look at a batch's mode; a
        decode step would be replayed through it.
        """
        from sglang.srt.model_executor.runner.eager_runner import EagerRunner

        runner = self.model_runner.decode_cuda_graph_runner
        return self._one_width and runner is not None and not isinstance(runner, EagerRunner)

    def _draft(self, batch: ScheduleBatch) -> list[list[int]]:
        """Drafts of each request; empty where it has none, or may not have any."""
        if self._refusal is not None or batch.return_hidden_states:
            return [[] for _ in batch.reqs]
        committed = batch.seq_lens_cpu.tolist()
        return [
            self._draft_request(req, length)
            for req, length in zip(batch.reqs, committed, strict=True)
        ]

    def _draft_request(self, req: Req, committed: int) -> list[int]:
        if not draft_eligibility.may_draft(req):
            return []
        # One token is emitted beyond the drafts; no draft may lie behind the last one wanted, nor
        # behind the last position of the model.
        wanted = req.sampling_params.max_new_tokens - len(req.output_ids) - 1
        positions = self.model_runner.model_config.context_len - 1 - committed
        room = min(wanted, positions, self._width - 1)
        drafter = self.indexes.drafter(req.rid, req.origin_input_ids, req.output_ids)
        return [] if drafter is None else drafter.draft(room)

    def _decode(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """SGLang's own decode of one token a request."""
        count = len(batch.reqs)
        batch.spec_info = None
        batch.input_ids = self._tensor(pending_tokens(batch))
        batch.out_cache_loc = self._slots(batch.req_pool_indices, batch.seq_lens)
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        batch.seq_lens_sum = None
        result = self._target_worker.forward_batch_generation(batch)
        output = result.logits_output
        if batch.return_logprob and output.next_token_logprobs is not None:
            output.next_token_logprobs = output.next_token_logprobs.view(count, 1)
        result.accept_lens = torch.ones(count, dtype=torch.int32, device=self.device)
        return self._finish(result, batch.seq_lens, stride=1)

    def _verify(
        self, batch: ScheduleBatch, chains: list[list[int]], mask: GrammarMask | None
    ) -> GenerationBatchResult:
        """Verify `chains` and emit what they and the samples agree on, and one token more."""
        step = self._lay_out(chains, mask)
        positions = self._prepare(batch, step)
        result = self._target_worker.forward_batch_generation(batch, is_verify=True)
        logits = result.logits_output.next_token_logits
        info, sampler = batch.sampling_info, self.model_runner.sampler
        verify.bias_rows(logits, info, sampler, step.mask, step.verify_lens, step.row_starts)
        draw = verify.RowSampler(
            sampler, logits, info, positions, step.verify_lens, at_once=self._one_width
        )
        emitted = verify.sample_and_match(step.chains, step.row_starts, draw, self.emit)
        # On CUDA hidden states come back with the logits' rows, and share this stride.
        stride = self._width if self._one_width else max(len(tokens) for tokens in emitted)
        if batch.return_logprob:
            self._add_logprobs(batch, result, step, emitted, stride)
        padded = [token for tokens in emitted for token in tokens + [0] * (stride - len(tokens))]
        result.next_token_ids = self._tensor(padded)
        result.accept_lens = self._tensor([len(tokens) for tokens in emitted], torch.int32)
        batch.forward_mode = ForwardMode.DECODE
        return self._finish(result, batch.seq_lens + result.accept_lens, stride)

    def _lay_out(self, chains: list[list[int]], mask: GrammarMask | None) -> _Step:
        lens = [1 + len(chain) for chain in chains]
        if self._one_width:
            if mask is not None:
                mask = mask._replace(
                    vocab_mask=draft_grammar.spread(mask.vocab_mask, lens, self._width).to(
                        self.device
                    )
                )
            lens = [self._width] * len(chains)
        return _Step(chains, lens, [0, *accumulate(lens)][:-1], mask)

    def _prepare(self, batch: ScheduleBatch, step: _Step) -> torch.Tensor:
        """Turn the batch into the verify step; returns the position of each row."""
        tokens: list[int] = []
        offsets: list[int] = []
        for pending, chain, count in zip(
            pending_tokens(batch), step.chains, step.verify_lens, strict=True
        ):
            padding = count - 1 - len(chain)
            tokens += [pending, *chain, *[pending] * padding]
            offsets += range(count)
        lens = self._tensor(step.verify_lens)
        starts = batch.seq_lens.repeat_interleave(lens)
        ahead = starts + self._tensor(offsets)
        owners = batch.req_pool_indices.repeat_interleave(lens)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = self._tensor(tokens)
        batch.out_cache_loc = self._slots(owners, ahead)
        # Padding may reach past the model's last position, which it has no rotation for.
        positions = ahead.clamp(max=self.model_runner.model_config.context_len - 1)
        batch.spec_info = LookupVerifyInput(
            step.verify_lens, positions, self._width if self._one_width else -1
        )
        return positions

    def _add_logprobs(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        step: _Step,
        emitted: list[list[int]],
        stride: int,
    ) -> None:
        """Log-probabilities of the emitted tokens, ``[requests, stride]``, into the result."""
        rows = len(result.logits_output.next_token_logits)
        predicted = [0] * rows
        accepted = []
        for start, tokens in zip(step.row_starts, emitted, strict=True):
            predicted[start : start + len(tokens)] = tokens
            accepted.append([start + min(j, len(tokens) - 1) for j in range(stride)])
        compute_spec_logprobs(
            batch,
            result.logits_output,
            self._tensor(predicted),
            accept_index=self._tensor(accepted),
        )

    def _finish(
        self, result: GenerationBatchResult, new_seq_lens: torch.Tensor, stride: int
    ) -> GenerationBatchResult:
        result.new_seq_lens = new_seq_lens
        result.next_draft_input = LookupInput()
        result.speculative_num_draft_tokens = self._width
        result.speculative_output_stride = stride
        return result

    def _slots(self, owners: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """KV slots reserved for the tokens at `places` of the rows `owners`."""
        return self.req_to_token_pool.req_to_token[owners, places].to(torch.int64)

    def _tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def pending_tokens(batch: ScheduleBatch) -> list[int]:
    """The last token of each request, which has no KV yet."""
    return [req.output_ids[-1] for req in batch.reqs]
