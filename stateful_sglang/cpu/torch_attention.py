"""Attention over a token-indexed KV pool in plain torch: work is new tokens times context.

The reference for the compiled kernel, and what runs where there is no compiler.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from stateful_sglang.cpu.plan import Slots, StepPlan

_CHUNK = 256
"""Queries attended at once, so that a long prompt's early queries don't meet its late keys."""
_FEW = 32
"""Up to so many queries the heads of a group become rows of one matrix, which reads K and V once a
group; with more, reading them per head costs less than the larger mask."""


class AttentionCall(NamedTuple):
    """One layer's part of a pass. Heads of a group are adjacent, as everywhere in SGLang."""

    q: torch.Tensor
    """[tokens, q_heads, k_dim]"""
    k_new: torch.Tensor | None
    """[tokens, kv_heads, k_dim] to be written to the pool first; None: it is there already."""
    v_new: torch.Tensor | None
    """[tokens, kv_heads, v_dim], with ``k_new``."""
    out_loc: torch.Tensor | None
    """[tokens] int64 slots of ``k_new`` and ``v_new``."""
    k_pool: torch.Tensor
    """[slots, kv_heads, k_dim]"""
    v_pool: torch.Tensor
    """[slots, kv_heads, v_dim]"""
    out: torch.Tensor
    """[tokens, q_heads, v_dim], written whole."""
    scale: float
    logit_cap: float = 0.0
    """Scores become ``cap * tanh(score / cap)``; 0 for none."""
    window: int = -1
    """A query sees keys at positions from its own minus this; negative for all."""
    causal: bool = True
    """False: every query sees all tokens of its request."""


def attend(plan: StepPlan, call: AttentionCall) -> None:
    """Write new keys and values to the pool, then attend; fills ``call.out``."""
    if call.k_new is not None and call.v_new is not None and call.out_loc is not None:
        call.k_pool.index_copy_(0, call.out_loc, call.k_new.to(call.k_pool.dtype))
        call.v_pool.index_copy_(0, call.out_loc, call.v_new.to(call.v_pool.dtype))
    row = 0
    for request, new in enumerate(plan.new_lens):
        if new:
            rows = slice(row, row + new)
            _attend_request(plan, request, call, call.q[rows], call.out[rows])
            row += new


def _attend_request(
    plan: StepPlan, request: int, call: AttentionCall, q: torch.Tensor, out: torch.Tensor
) -> None:
    new, total = plan.new_lens[request], plan.kv_lens[request]
    slots = plan.slots(request)
    k, v = _rows(call.k_pool, slots, q.dtype), _rows(call.v_pool, slots, q.dtype)
    if not call.causal:
        out.copy_(_scores_to_values(q, k, v, None, call))
        return
    group = q.shape[1] // k.shape[1]
    is_tree = plan.tree_mask is not None
    if new == total > _FEW and call.window < 0 and not is_tree and not call.logit_cap:
        # A prompt from its first token on is the one case that torch masks without a mask.
        out.copy_(_scores_to_values(q, k, v, None, call, from_start=True))
        return
    for first in range(0, new, _CHUNK):
        last = min(first + _CHUNK, new)
        # In a tree, a node's ancestors all come before it, so that chunks end alike.
        low = max(total - new + first - call.window, 0) if call.window >= 0 and not is_tree else 0
        keys = slice(low, total - new + last)
        copies = group if last - first <= _FEW else 1
        mask = plan.mask(request, first, last, keys, call.window, q.dtype, copies)
        out[first:last] = _scores_to_values(q[first:last], k[keys], v[keys], mask, call)


def _scores_to_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    call: AttentionCall,
    from_start: bool = False,
) -> torch.Tensor:
    """Attention of [n, q_heads, k_dim] over [m, kv_heads, .].

    The additive mask is [n, m], repeated for each head of a group where n is at most `_FEW`. With
    ``from_start``, n equals m and each query sees the keys up to its own.
    """
    n, q_heads, k_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    grouped = q.view(n, kv_heads, group, k_dim).permute(1, 2, 0, 3)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if n <= _FEW:
        grouped = grouped.reshape(1, kv_heads, group * n, k_dim)
        k, v = k[None], v[None]
    else:
        k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
    if call.logit_cap:
        result = _capped(grouped, k, v, mask, call.scale, call.logit_cap)
    else:
        result = scaled_dot_product_attention(
            grouped, k, v, attn_mask=mask, is_causal=from_start, scale=call.scale
        )
    return result.reshape(kv_heads, group, n, -1).permute(2, 0, 1, 3).reshape(n, q_heads, -1)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    scores = torch.matmul(q.float() * scale, k.float().transpose(-1, -2))
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)


def _rows(pool: torch.Tensor, slots: Slots, dtype: torch.dtype) -> torch.Tensor:
    rows = pool[slots] if isinstance(slots, slice) else pool.index_select(0, slots)
    return rows.to(dtype)
