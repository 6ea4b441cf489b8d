"""All decoder layers of a dense model as one call into the kernels.

A layer's ten operations cost SGLang some 80 microseconds of Python and ten parallel regions; thirty
layers of a small model spend more on that than on memory. Here the whole stack is one region.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stateful_sglang.cpu import abi, ops
from stateful_sglang.cpu.ops import ACTIVATIONS, Packed, library
from stateful_sglang.cpu.plan import StepPlan


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and constants that all layers share."""

    hidden: int
    inter: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    neox: bool
    act: str
    """`silu`, `gelu_tanh` or `gelu`."""
    eps: float


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer's weights; None leaves a part out. Norm weights are float32, any offset added."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    """The norm before the gated layer."""
    qkv: Packed
    o: Packed
    gate_up: Packed
    down: Packed
    rope_cache: torch.Tensor
    """[positions, rotary_dim], cosines then sines, float32 or the model's dtype."""
    scale: float
    logit_cap: float = 0.0
    window: int = -1
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    attn_out_norm: torch.Tensor | None = None
    """Norms what attention adds to the residual, as Gemma 2 does."""
    mlp_out_norm: torch.Tensor | None = None


class DecoderStack:
    """The layers and the final norm over pools of keys and values."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        final_norm: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.shape = shape
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.dtype = dtype
        self._rows = (abi.Layer * len(layers))()
        for row, layer in zip(self._rows, layers, strict=True):
            _fill(row, layer)
        self._pools: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.clock: torch.Tensor | None = None
        """[len(abi.PARTS)] int64: where given, each run adds its nanoseconds by part."""
        self._call = abi.Decoder(
            dtype=abi.F32 if dtype == torch.float32 else abi.BF16,
            layers=len(layers),
            hidden=shape.hidden,
            inter=shape.inter,
            q_heads=shape.q_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary_dim=shape.rotary_dim,
            neox=int(shape.neox),
            act=ACTIVATIONS[shape.act],
            eps=shape.eps,
            layer=ctypes.addressof(self._rows),
            final_norm=final_norm.data_ptr(),
        )

    def bind_pools(self, pools: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Say where each layer's keys and values are, [slots, kv_heads, head_dim] each.

        Raises:
          ValueError: a pool does not fit the stack.
        """
        if len(pools) != len(self.layers):
            raise ValueError(f"{len(pools)} pools for {len(self.layers)} layers.")
        want = (self.shape.kv_heads, self.shape.head_dim)
        for row, (k, v) in zip(self._rows, pools, strict=True):
            for pool in (k, v):
                if pool.shape[1:] != want or pool.dtype != self.dtype or pool.stride(2) != 1:
                    raise ValueError(
                        f"KV pool {pool.dtype} {list(pool.shape)}: expected {self.dtype} "
                        f"[slots, {want[0]}, {want[1]}]."
                    )
                ops.use_large_pages(pool)
            row.k_pool, row.k_slot, row.k_head = k.data_ptr(), k.stride(0), k.stride(1)
            row.v_pool, row.v_slot, row.v_head = v.data_ptr(), v.stride(0), v.stride(1)
        self._pools = pools

    def run(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        out_loc: torch.Tensor,
        plan: StepPlan,
    ) -> torch.Tensor:
        """Hidden states of the new tokens after the final norm; their keys and values are written.

        Args:
          embeds: [tokens, hidden] in the model's dtype.
          positions: [tokens] int64, for the rotary embedding.
          out_loc: [tokens] int64 slots of the new keys and values.
          plan: whose tokens these are, and the slots of what came before.
        """
        if self._pools is None:
            raise RuntimeError("DecoderStack.run before bind_pools.")
        tokens = embeds.shape[0]
        if not tokens == positions.numel() == out_loc.numel() == sum(plan.new_lens):
            raise ValueError(
                f"DecoderStack: {tokens} embeddings, {positions.numel()} positions, "
                f"{out_loc.numel()} slots and {sum(plan.new_lens)} planned tokens differ."
            )
        embeds = embeds.to(self.dtype).contiguous()
        positions = positions.to(torch.int64).contiguous()
        out_loc = out_loc.to(torch.int64).contiguous()
        out = torch.empty_like(embeds)
        call = self._call
        call.tokens, call.batch = tokens, len(plan.new_lens)
        call.embeds, call.embeds_row = embeds.data_ptr(), embeds.stride(0)
        call.out, call.out_row = out.data_ptr(), out.stride(0)
        call.positions, call.out_loc = positions.data_ptr(), out_loc.data_ptr()
        call.req_to_token = plan.req_to_token.data_ptr()
        call.req_stride = plan.req_to_token.stride(0)
        call.req_index = plan.req_index.data_ptr()
        call.seq_lens, call.q_starts = plan.seq_lens.data_ptr(), plan.q_starts.data_ptr()
        call.mask = call.mask_offsets = None
        if plan.tree_mask is not None and plan.mask_offsets is not None:
            call.mask = plan.tree_mask.data_ptr()
            call.mask_offsets = plan.mask_offsets.data_ptr()
        call.clock = None if self.clock is None else self.clock.data_ptr()
        library().sg_decoder(call)
        return out


def _fill(row: abi.Layer, layer: DecoderLayer) -> None:
    def at(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    row.input_norm, row.post_norm = at(layer.input_norm), at(layer.post_norm)
    for name in ("qkv", "o", "gate_up", "down"):
        packed: Packed = getattr(layer, name)
        setattr(row, name, at(packed.data))
        setattr(row, f"{name}_scale", at(packed.scale))
    row.qkv_bias, row.o_bias, row.down_bias = (
        at(layer.qkv_bias),
        at(layer.o_bias),
        at(layer.down_bias),
    )
    row.q_norm, row.k_norm = at(layer.q_norm), at(layer.k_norm)
    row.attn_out_norm, row.mlp_out_norm = at(layer.attn_out_norm), at(layer.mlp_out_norm)
    row.rope_cache, row.rope_row = at(layer.rope_cache), layer.rope_cache.stride(0)
    row.rope_cache_f32 = int(layer.rope_cache.dtype == torch.float32)
    row.scale, row.logit_cap, row.window = layer.scale, layer.logit_cap, layer.window
