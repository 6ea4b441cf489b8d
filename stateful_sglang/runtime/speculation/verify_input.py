"""What a speculative batch carries through SGLang: a verify input, or only the right type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType

from stateful_sglang.attachments.check import Attachment

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.kv_loc_plan import KVLocPlan

ALGORITHM = "PROMPT_LOOKUP"
"""Name by which SGLang knows the algorithm that these inputs belong to."""

ATTACHMENTS = (
    Attachment(
        "sglang.srt.speculative.spec_info.SpecInput",
        "subclass",
        "a chain verify input with its own number of tokens for each request",
    ),
    Attachment(
        "sglang.srt.speculative.spec_info.create_dummy_verify_input",
        "hook",
        "SGLang's trial runs of the verify step use a verify input of ours",
    ),
    Attachment(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner."
        "get_spec_info",
        "hook",
        "CUDA graphs of the verify step are captured with a verify input of ours",
    ),
    Attachment(
        "sglang.srt.mem_cache.kv_loc_plan.window_read_extent",
        "relies",
        "reads draft_token_num of every verify input: ours names its longest request",
    ),
    Attachment(
        "sglang.srt.speculative.ngram_info.NgramVerifyInput.generate_attn_arg_prefill",
        "relies",
        "the arguments that FlashInfer calls it with, and the layout it expects, are ours",
    ),
    Attachment(
        "sglang.srt.mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream",
        "relies",
        "fills the KV indices of FlashInfer's layout",
    ),
    Attachment(
        "sglang.srt.mem_cache.kv_loc_plan.KVLocPlan",
        "relies",
        "names the KV that FlashInfer's layout is filled from",
    ),
)


class LookupInput(SpecInput):
    """Carried from step to step: empty, because drafts come from what the requests said."""

    def __init__(self) -> None:
        super().__init__(SpecInputType.NGRAM_VERIFY)

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int]) -> None:
        """Requests left the batch; there is nothing to drop."""

    def merge_batch(self, other: SpecInput | None) -> None:
        """Requests joined the batch; there is nothing to add."""


class LookupVerifyInput(LookupInput):
    """One verify step of chains: request `i` brings its pending token and its drafts.

    Attributes:
        verify_lens: Tokens of each request in this step, pending token included. They lie one
            request after the other in `input_ids`, `positions`, `out_cache_loc` and the logits.
        positions: ``[sum(verify_lens)]`` int64.
        custom_mask: None: within its request every token sees those before it.
    """

    capture_hidden_mode = CaptureHiddenMode.NULL

    def __init__(
        self, verify_lens: list[int], positions: torch.Tensor | None, width: int = -1
    ) -> None:
        """`width` is the number of tokens of every request, or -1 where they differ."""
        super().__init__()
        self.verify_lens = verify_lens
        self.positions = positions
        self.num_tokens_per_req = width
        self.num_tokens_for_logprob_per_req = width

    @property
    def draft_token_num(self) -> int:
        """Most tokens of a request: SGLang reads at most so far past what is committed."""
        return max(self.verify_lens, default=self.num_tokens_per_req)

    def generate_attn_arg_prefill(
        self,
        *,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        translator: KVIndexTranslator,
        plan: KVLocPlan,
        kind: IdSpaceKind = IdSpaceKind.FULL,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """FlashInfer's layout of a verify step: KV indices, KV and query offsets, no mask.

        `paged_kernel_lens` are the tokens before the step; `translator` names their slots, and
        those of the step, as the pool `kind` indexes them.
        """
        width, count = self.num_tokens_per_req, len(req_pool_indices)
        device = req_pool_indices.device
        query_offsets = torch.arange(
            0, (count + 1) * width, step=width, dtype=torch.int32, device=device
        )
        lens = paged_kernel_lens + width
        kv_offsets = torch.zeros(count + 1, dtype=torch.int32, device=device)
        kv_offsets[1:] = torch.cumsum(lens, dim=0)
        kv_indices = torch.empty(
            paged_kernel_lens_sum + width * count, dtype=torch.int32, device=device
        )
        translator.pack_read_stream(
            plan,
            req_pool_indices=req_pool_indices,
            seq_lens=lens,
            indptr=kv_offsets,
            out=kv_indices,
            kind=kind,
        )
        return kv_indices, kv_offsets, query_offsets, None


def for_trial_run(
    result: Any, spec_algorithm: Any, custom_mask: Any, num_tokens_per_req: int, *_: Any, **__: Any
) -> Any:
    """After-hook of ``create_dummy_verify_input``: our verify input where SGLang has none."""
    return _ours(result, spec_algorithm, num_tokens_per_req)


def for_capture(result: Any, runner: Any, _num_tokens: int) -> Any:
    """After-hook of ``DecodeCudaGraphRunner.get_spec_info``: our verify input likewise."""
    return _ours(result, runner.model_runner.spec_algorithm, runner.captured_req_width)


def _ours(result: Any, spec_algorithm: Any, width: int) -> Any:
    if result is None and spec_algorithm.name == ALGORITHM:
        return LookupVerifyInput([], None, width)
    return result
