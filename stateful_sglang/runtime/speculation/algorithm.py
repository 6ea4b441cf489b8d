"""Registration of prompt-lookup drafts as a speculative algorithm of SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.cpu import platform
from stateful_sglang.runtime.options import Options
from stateful_sglang.runtime.speculation import verify_input as draft_input

NAME = draft_input.ALGORITHM

_EXTRA_LEN = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
_TRIAL = "sglang.srt.speculative.spec_info.create_dummy_verify_input"
_CAPTURE = (
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.get_spec_info"
)
ATTACHMENTS = (
    Attachment(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm",
        "registry",
        "prompt-lookup drafts are a speculative algorithm",
    ),
    Attachment(
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo",
        "subclass",
        "a plain registration lacks what SGLang calls at start",
    ),
    Attachment(
        _EXTRA_LEN,
        "hook",
        "a request's row holds what is reserved past the context limit: by default, from nine "
        "tokens a step on, the last reservation writes into the next request's row",
    ),
    *draft_input.ATTACHMENTS,
    Attachment(
        "sglang.srt.managers.overlap_utils.FutureMap.__init__",
        "relies",
        "the map that SGLang makes for its own algorithms",
    ),
    Attachment(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_page_size",
        "relies",
        "the size of what is reserved before a step",
    ),
    Attachment(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode",
        "relies",
        "how much is reserved before a step",
    ),
)


class PromptLookup(CustomSpecAlgo):
    """SGLang's view of the algorithm: synchronous, without a draft model or draft KV."""

    def has_draft_kv(self) -> bool:
        """Nothing is drafted by a model, so no draft writes KV."""
        return False

    def carries_draft_hidden_states(self) -> bool:
        """Drafts need no hidden states."""
        return False

    def need_topk(self) -> bool:
        """Drafts carry no probabilities."""
        return False

    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        """The map SGLang creates for its own algorithms; idle without overlap."""
        return FutureMap(
            device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay
        )

    def handle_server_args(self, server_args: Any) -> None:
        """Set what the algorithm needs where the launcher or the user did not.

        A lookup reads the tokens of the step before, so the host waits for them: no overlap.
        """
        config = Options.from_env() or Options()
        if server_args.speculative_num_draft_tokens is None:
            server_args.speculative_num_draft_tokens = config.max_draft + 1
        server_args.speculative_num_steps = server_args.speculative_num_draft_tokens - 1
        server_args.speculative_eagle_topk = 1
        server_args.disable_overlap_schedule = True
        server_args.enable_mixed_chunk = False

    def get_platform_worker_cls(self) -> None:
        """No platform brings a worker of its own for it."""

    def create_worker(self, server_args: Any) -> type:
        """The worker class."""
        return self.factory(server_args)


def validate(server_args: Any) -> None:
    """Refuse what drafts were never tested with.

    Raises:
        ValueError: Names the argument and the remedy.
    """
    refused = {
        "--pp-size": server_args.pp_size > 1,
        "--enable-dp-attention": bool(server_args.enable_dp_attention),
        "--disaggregation-mode": server_args.disaggregation_mode != "null",
        "--enable-two-batch-overlap": bool(server_args.enable_two_batch_overlap),
        "--enable-watermark": bool(server_args.enable_watermark),
    }
    for argument, given in refused.items():
        if given:
            raise ValueError(
                f"{argument} does not work with prompt-lookup drafts; leave it out, or start "
                "without drafts (--draft off)"
            )


def register() -> None:
    """Register the algorithm and its hooks; SGLang applies hooks when all plugins have run."""

    @SpeculativeAlgorithm.register(
        NAME, supports_overlap=False, validate_server_args=validate, spec_class=PromptLookup
    )
    def worker(_server_args: Any) -> type:
        from stateful_sglang.runtime.speculation.worker import PromptLookupWorker

        return PromptLookupWorker

    HookRegistry.register(_EXTRA_LEN, _room_for_reservation, HookType.AFTER)
    if platform.has_accelerator():
        HookRegistry.register(_TRIAL, draft_input.for_trial_run, HookType.AFTER)
        HookRegistry.register(_CAPTURE, draft_input.for_capture, HookType.AFTER)


def _room_for_reservation(extra: int) -> int:
    # A request decodes up to the context length, and before each step SGLang reserves this much
    # beyond what it committed.
    return max(extra, get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)
