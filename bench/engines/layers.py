"""Our layers and LM head without SGLang, as far as one sequence needs them."""

from __future__ import annotations

from typing import Any

import torch


class Layers:
    """Our layers and LM head under a transformers Llama's weights, one sequence."""

    def __init__(
        self, model: Any, dtype: torch.dtype, int8: bool = False, slots: int = 1024
    ) -> None:
        from stateful_sglang.cpu import ops
        from stateful_sglang.cpu.decoder import DecoderLayer, DecoderShape, DecoderStack

        config = model.config
        dim = config.hidden_size // config.num_attention_heads
        angles = torch.outer(torch.arange(slots).float(), model.model.rotary_emb.inv_freq.float())
        rope = torch.cat([angles.cos(), angles.sin()], 1)
        shape = DecoderShape(
            hidden=config.hidden_size,
            inter=config.intermediate_size,
            q_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=dim,
            rotary_dim=dim,
            neox=True,
            act="silu",
            eps=config.rms_norm_eps,
        )

        def packed(*parts: Any, gated: bool = False) -> ops.Packed:
            return ops.pack(torch.cat([p.weight.data.to(dtype) for p in parts]), gated, int8)

        layers = [
            DecoderLayer(
                input_norm=layer.input_layernorm.weight.data.float(),
                post_norm=layer.post_attention_layernorm.weight.data.float(),
                qkv=packed(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                o=packed(layer.self_attn.o_proj),
                gate_up=packed(layer.mlp.gate_proj, layer.mlp.up_proj, gated=True),
                down=packed(layer.mlp.down_proj),
                rope_cache=rope,
                scale=dim**-0.5,
            )
            for layer in model.model.layers
        ]
        self.stack = DecoderStack(shape, layers, model.model.norm.weight.data.float(), dtype)
        self.stack.bind_pools(
            [
                tuple(torch.zeros(slots, shape.kv_heads, dim, dtype=dtype) for _ in range(2))
                for _ in layers
            ]
        )
        self.embedding = model.model.embed_tokens.weight.data.to(dtype)
        self.head = packed(model.lm_head)
        self.table = torch.randperm(slots, generator=torch.Generator().manual_seed(0))
        self.table = self.table.to(torch.int32)[None]

    def logits(self, ids: torch.Tensor, past: int = 0) -> torch.Tensor:
        """Float32 logits [n, vocab] of the tokens ids [n] that follow `past` earlier ones."""
        from stateful_sglang.cpu import ops
        from stateful_sglang.cpu.plan import plan_step

        total = past + len(ids)
        plan = plan_step(self.table, torch.tensor([0]), [len(ids)], [total])
        hidden = self.stack.run(
            self.embedding[ids],
            torch.arange(past, total),
            self.table[0, past:total].long(),
            plan,
        )
        return ops.linear(hidden, self.head, out_dtype=torch.float32)
