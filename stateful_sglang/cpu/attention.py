"""SGLang's attention backend for a CPU: what is new costs in proportion to what is new.

It takes the name ``torch_native``, because SGLang decides by that name that Triton is not to be
used. Stock ``torch_native`` pads every prompt's queries to the whole sequence and cannot verify
drafts; what it does that ours does not (cross-attention) is left to it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from stateful_sglang.cpu import compiled_attention, torch_attention
from stateful_sglang.cpu.plan import StepPlan, plan_step
from stateful_sglang.cpu.torch_attention import AttentionCall

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Extend, decode and verify over the token-indexed KV pool, any batch mix.

    A verify pass may be ragged: a ``spec_info`` with ``verify_lens`` says how many tokens each
    request verifies (a chain); one without has ``draft_token_num`` for all, and may bring a
    ``custom_mask`` over the new tokens.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        pool = self.token_to_kv_pool
        if isinstance(pool, SWAKVPool):
            raise NotImplementedError(
                "this model keeps the KV of its sliding-window layers in a pool of their own, "
                "which the CPU backend does not read; start with --disable-hybrid-swa-memory"
            )
        self._writes_pool = (
            type(pool) is MHATokenToKVPool
            and not pool.is_quantized_kv_cache
            and not pool.use_hnd
            and pool.store_dtype == pool.dtype == model_runner.dtype
        )
        compiled = compiled_attention.available()
        self._attend = compiled_attention.attend if compiled else torch_attention.attend
        self._plan: StepPlan | None = None
        self._left_to_stock = False

    @property
    def plain_plan(self) -> StepPlan | None:
        """The pass's plan where a kernel may write keys and values into the pool itself."""
        return self._plan if self._writes_pool else None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the pass; called once before its layers run."""
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        self._plan = None
        if mode.is_decode():
            self._plan = self._plan_decode(forward_batch)
        elif mode.is_target_verify():
            self._plan = self._plan_verify(forward_batch)
        elif mode.is_extend() and not mode.is_dllm_extend():
            self._plan = self._plan_extend(forward_batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **unknown: Any,
    ) -> torch.Tensor:
        """Attend the new tokens of prompts or drafts. q: [tokens, q_heads * head_dim]."""
        _refuse(unknown)
        if self._plan is None or layer.is_cross_attention:
            self._say_left_to_stock(layer)
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(self._plan, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **unknown: Any,
    ) -> torch.Tensor:
        """Attend one new token a request. q: [batch, q_heads * head_dim]."""
        _refuse(unknown)
        if self._plan is None or layer.is_cross_attention:
            self._say_left_to_stock(layer)
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(self._plan, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self,
        plan: StepPlan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        pool = self.token_to_kv_pool
        if not (save_kv_cache and k is not None):
            k = v = None
        elif not self._writes_pool:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
            k = v = None
        out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        self._attend(
            plan,
            AttentionCall(
                q=q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
                k_new=k,
                v_new=v,
                out_loc=forward_batch.out_cache_loc,
                k_pool=pool.get_key_buffer(layer.layer_id),
                v_pool=pool.get_value_buffer(layer.layer_id),
                out=out.view(-1, layer.tp_q_head_num, layer.v_head_dim),
                scale=layer.scaling,
                logit_cap=layer.logit_cap or 0.0,
                window=layer.sliding_window_size,
                causal=layer.attn_type != AttentionType.ENCODER_ONLY,
            ),
        )
        return out

    def _plan_decode(self, forward_batch: ForwardBatch) -> StepPlan:
        lengths = forward_batch.seq_lens.tolist()
        return self._planned(forward_batch, [1] * len(lengths), lengths)

    def _plan_extend(self, forward_batch: ForwardBatch) -> StepPlan:
        return self._planned(
            forward_batch, forward_batch.extend_seq_lens.tolist(), forward_batch.seq_lens.tolist()
        )

    def _plan_verify(self, forward_batch: ForwardBatch) -> StepPlan:
        spec = forward_batch.spec_info
        committed = forward_batch.seq_lens.tolist()  # without the pending token and its drafts
        widths = getattr(spec, "verify_lens", None)
        if widths is None:
            widths = [spec.draft_token_num] * len(committed)
        elif isinstance(widths, torch.Tensor):
            widths = widths.tolist()
        lengths = [length + width for length, width in zip(committed, widths, strict=True)]
        return self._planned(forward_batch, widths, lengths, getattr(spec, "custom_mask", None))

    def _planned(
        self,
        forward_batch: ForwardBatch,
        new_lens: list[int],
        kv_lens: list[int],
        tree_mask: torch.Tensor | None = None,
    ) -> StepPlan:
        return plan_step(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            new_lens,
            kv_lens,
            tree_mask,
        )

    def _say_left_to_stock(self, layer: RadixAttention) -> None:
        if not self._left_to_stock:
            self._left_to_stock = True
            logger.warning(
                "Attention layer %d (%s) is of a kind our CPU backend does not compute; SGLang's "
                "own torch_native does, slower.",
                layer.layer_id,
                "cross-attention" if layer.is_cross_attention else layer.attn_type.value,
            )


def _refuse(unknown: dict[str, Any]) -> None:
    asked = [name for name, value in unknown.items() if value is not None]
    if asked:
        raise NotImplementedError(
            f"this model asks attention for {', '.join(asked)}, which the CPU backend does not "
            "have. Serve it on a GPU, or choose another model"
        )
