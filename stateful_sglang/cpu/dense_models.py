"""Which of SGLang's dense models the decoder stack computes, and their weights in its layout.

A model is taken only if every class in it is one that was read: a subclass that computes something
else falls back to the layer-by-layer path. Weights are packed once; `refresh` packs them again into
the same memory after an update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stateful_sglang.cpu import ops
from stateful_sglang.cpu.decoder import DecoderLayer, DecoderShape, DecoderStack
from stateful_sglang.cpu.families import family_of
from stateful_sglang.cpu.families.base import Family

Refresh = Callable[[], None]


class UnsupportedModelError(Exception):
    """The stack does not compute this model; the message says what it met."""


@dataclass(frozen=True)
class DenseModel:
    """A model's layers in the kernels' layout."""

    family: Family
    stack: DecoderStack
    refreshers: tuple[Refresh, ...]

    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        for refresh in self.refreshers:
            refresh()

    def embed(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [tokens, hidden] as the model's own forward makes them."""
        embeds = model.embed_tokens(input_ids)
        if self.family.embedding_scale is not None:
            embeds *= self.family.embedding_scale(embeds.shape[1], embeds.dtype)
        return embeds


def _require(holds: bool, met: str) -> None:
    if not holds:
        raise UnsupportedModelError(met)


def _class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def build(model: nn.Module, *, int8: bool = False) -> DenseModel:
    """Pack a model's layers (`LlamaModel` and its like, not the causal LM around it).

    Args:
      int8: round the weights of linear layers to int8.

    Raises:
      UnsupportedModelError: something in it is not what the stack computes.
    """
    name = _class_name(model)
    family = family_of(name)
    if family is None:
        raise UnsupportedModelError(f"the model class is {name}")
    return _Builder(model, family, int8).build()


class _Builder:
    def __init__(self, model: nn.Module, family: Family, int8: bool) -> None:
        self.int8 = int8
        self.model = model
        self.family = family
        self.refreshers: list[Refresh] = []
        self.caches: dict[int, torch.Tensor] = {}
        self.dtype: torch.dtype = torch.float32

    def build(self) -> DenseModel:
        first = self.model.layers[0]
        _require(hasattr(first, "self_attn"), "the first layer is on another rank")
        self.dtype = first.self_attn.qkv_proj.weight.dtype
        attn, mlp = first.self_attn, first.mlp
        rope = attn.rotary_emb
        shape = DecoderShape(
            hidden=self.model.embed_tokens.weight.shape[1],
            inter=mlp.down_proj.weight.shape[1],
            q_heads=attn.num_heads,
            kv_heads=attn.num_kv_heads,
            head_dim=attn.head_dim,
            rotary_dim=rope.rotary_dim,
            neox=bool(rope.is_neox_style),
            act=self._activation(mlp.act_fn),
            eps=_eps(first.input_layernorm),
        )
        layers = [self._layer(layer, shape) for layer in self.model.layers]
        stack = DecoderStack(shape, layers, self._norm(self.model.norm, shape), self.dtype)
        return DenseModel(self.family, stack, tuple(self.refreshers))

    def _layer(self, layer: nn.Module, shape: DecoderShape) -> DecoderLayer:
        family, attn, mlp = self.family, layer.self_attn, layer.mlp
        for part, suffix in ((layer, "DecoderLayer"), (attn, "Attention")):
            want = f"{family.module}.{family.prefix}{suffix}"
            _require(_class_name(part) == want, f"a {_class_name(part)} where {want} was read")
        mlps = {f"{family.module}.{family.prefix}MLP", f"{family.mlp_module}.Qwen2MLP"}
        _require(_class_name(mlp) in mlps, f"a {_class_name(mlp)}")
        self._check_attention(attn, shape)
        _require(self._activation(mlp.act_fn) == shape.act, "layers of different activations")

        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        after = layer.post_attention_layernorm
        norms = {
            "input_norm": layer.input_layernorm,
            "post_norm": layer.pre_feedforward_layernorm if sandwich else after,
        }
        if sandwich:
            norms |= {"attn_out_norm": after, "mlp_out_norm": layer.post_feedforward_layernorm}
        if hasattr(attn, "q_norm"):
            norms |= {"q_norm": attn.q_norm, "k_norm": attn.k_norm}
        radix = attn.attn
        return DecoderLayer(
            **{field: self._norm(norm, shape) for field, norm in norms.items()},
            qkv=self._pack(attn.qkv_proj),
            o=self._pack(attn.o_proj),
            gate_up=self._pack(mlp.gate_up_proj, gated=True),
            down=self._pack(mlp.down_proj),
            qkv_bias=self._bias(attn.qkv_proj),
            o_bias=self._bias(attn.o_proj),
            down_bias=self._bias(mlp.down_proj),
            rope_cache=self._rope_cache(attn.rotary_emb),
            scale=radix.scaling,
            logit_cap=radix.logit_cap or 0.0,
            window=radix.sliding_window_size,
        )

    def _check_attention(self, attn: nn.Module, shape: DecoderShape) -> None:
        from sglang.srt.layers.radix_attention import AttentionType
        from sglang.srt.layers.rotary_embedding import RotaryEmbedding

        radix, rope = attn.attn, attn.rotary_emb
        _require(radix.attn_type == AttentionType.DECODER, f"{radix.attn_type} attention")
        _require(not radix.is_cross_attention, "cross-attention")
        _require(radix.qk_head_dim == radix.v_head_dim, "values of another size than keys")
        _require(radix.k_scale is None, "scaled keys")
        sizes = (radix.tp_q_head_num, radix.tp_k_head_num, attn.head_dim)
        want = (shape.q_heads, shape.kv_heads, shape.head_dim)
        _require(sizes == want, f"layers of different head sizes {sizes}, {want}")
        plain = (
            isinstance(rope, RotaryEmbedding)
            and type(rope).forward_native is RotaryEmbedding.forward_native
            and not hasattr(rope, "sin_cos_cache")
        )
        _require(plain, f"rotary embedding {type(rope).__name__}")
        _require(
            (rope.rotary_dim, bool(rope.is_neox_style)) == (shape.rotary_dim, shape.neox),
            "rotary embeddings of different kinds",
        )
        if (
            self.family.model == "Gemma3TextModel"
        ):  # its own forward rotates with the model's tables
            kind = self.model.rotary_emb.config.rope_parameters.get("rope_type", "default")
            _require(kind == "default", f"rope scaling {kind} outside the attention layer")

    def _activation(self, act: nn.Module) -> str:
        from sglang.srt.layers.activation import GeluAndMul, SiluAndMul

        if type(act) is SiluAndMul:
            return "silu"
        _require(type(act) is GeluAndMul, f"activation {type(act).__name__}")
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"

    def _pack(self, linear: nn.Module, gated: bool = False) -> ops.Packed:
        check_linear(linear)
        weight = linear.weight
        _require(weight.dtype == self.dtype, f"weights of {weight.dtype} and {self.dtype}")
        packed = ops.pack(weight.data, gated, self.int8)
        _require(not gated or linear.bias is None, "a bias on the gated layer")
        self.refreshers.append(lambda: ops.repack(packed, linear.weight.data))
        return packed

    def _bias(self, linear: nn.Module) -> torch.Tensor | None:
        if linear.bias is None:
            return None
        copy = linear.bias.data.to(self.dtype).clone()
        self.refreshers.append(lambda: copy.copy_(linear.bias.data))
        return copy

    def _norm(self, norm: nn.Module, shape: DecoderShape) -> torch.Tensor:
        offset = norm_offset(norm)
        _require(_eps(norm) == shape.eps, "norms of different epsilons")
        copy = norm.weight.data.float() + offset
        self.refreshers.append(lambda: copy.copy_(norm.weight.data.float() + offset))
        return copy

    def _rope_cache(self, rope: nn.Module) -> torch.Tensor:
        """SGLang rounds the table to the model's dtype on a CPU; in float32 it is exact."""
        if id(rope) not in self.caches:
            exact = rope._compute_cos_sin_cache().float().contiguous()
            held = rope.cos_sin_cache
            self.caches[id(rope)] = exact if exact.shape[0] >= held.shape[0] else held
        return self.caches[id(rope)]


def _eps(norm: nn.Module) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def norm_offset(norm: nn.Module) -> float:
    """What an RMSNorm adds to its weight: 0, or 1 for Gemma's.

    Raises:
      UnsupportedModelError: another norm, or one with special treatment.
    """
    from sglang.srt.layers import layernorm

    if type(norm) in (layernorm.GemmaRMSNorm, layernorm.Gemma3RMSNorm):
        return 1.0
    plain = (
        type(norm) is layernorm.RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and not norm.fp32_residual
        and norm.override_orig_dtype is None
        and not norm.cast_x_before_out_mul
    )
    _require(plain, f"norm {type(norm).__name__}")
    return 0.0


def check_linear(linear: Any) -> None:
    """Refuse a linear layer that is not a plain product with a 2-D weight on one rank."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.runtime_context import get_parallel

    method = type(getattr(linear, "quant_method", None))
    _require(method is UnquantizedLinearMethod, f"a linear layer with {method.__name__}")
    _require(get_parallel().tp_size == 1, "tensor parallelism")
    weight = linear.weight
    _require(
        weight.dim() == 2 and ops.supports(weight.dtype, weight.shape[1]),
        f"a weight of {weight.dtype} {list(weight.shape)}",
    )
