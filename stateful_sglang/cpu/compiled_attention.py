"""The compiled attention kernel behind the interface of `torch_attention`."""

from __future__ import annotations

from stateful_sglang.cpu import extension, ops
from stateful_sglang.cpu.plan import StepPlan
from stateful_sglang.cpu.torch_attention import AttentionCall
from stateful_sglang.cpu.torch_attention import attend as attend_in_torch


def available() -> bool:
    """Whether the kernels can be had here; compiles them if this is the first time."""
    return extension.load() is not None


def attend(plan: StepPlan, call: AttentionCall) -> None:
    """As `torch_attention.attend`, which also takes the calls that the kernel does not."""
    if not _takes(call):
        attend_in_torch(plan, call)
        return
    ops.attention(
        call.q,
        call.k_pool,
        call.v_pool,
        plan.req_to_token,
        plan.req_index,
        plan.seq_lens,
        plan.q_starts,
        call.scale,
        k_new=call.k_new,
        v_new=call.v_new,
        out_cache_loc=call.out_loc,
        logit_cap=call.logit_cap,
        window=call.window,
        causal=call.causal,
        mask=plan.tree_mask,
        mask_offsets=plan.mask_offsets,
        out=call.out,
    )


def _takes(call: AttentionCall) -> bool:
    head_dim = call.q.shape[2]
    return (
        call.q.dtype == call.k_pool.dtype == call.v_pool.dtype
        and call.k_pool.shape[2] == call.v_pool.shape[2] == head_dim
        and ops.supports(call.q.dtype, head_dim)
    )
