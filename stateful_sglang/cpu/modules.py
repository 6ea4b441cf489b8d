"""Attach the kernels to a model that SGLang has loaded, and follow its weight updates.

A dense model of a known family gets the whole stack of layers as one call (`dense_models`). Of any
other model, each linear layer, norm, activation and rotary embedding of a known kind is replaced on
its own, and the rest stays SGLang's; what was met is logged once. The LM head is packed either way.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stateful_sglang.cpu import dense_models, extension, ops
from stateful_sglang.cpu.decoder import DecoderStack
from stateful_sglang.cpu.dense_models import DenseModel, UnsupportedModelError

logger = logging.getLogger(__name__)

_REFRESHERS = "_stateful_sglang_refreshers"
_DENSE = "_stateful_sglang_dense"


def attach_to_model(model: nn.Module, *, int8: bool = False) -> str:
    """Put the kernels under a loaded causal LM, rounding its weights if asked; says what it did."""
    start = time.monotonic()
    refreshers: list[Callable[[], None]] = []
    head = _attach_head(model, refreshers, int8)
    inner = getattr(model, "model", model)
    try:
        dense = dense_models.build(inner, int8=int8)
    except UnsupportedModelError as reason:
        counts = _attach_modules(model, refreshers, int8)
        done = f"layer by layer ({reason}): " + (
            ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "nothing known"
        )
    else:
        _install(inner, dense)
        refreshers.append(dense.refresh)
        done = f"all {len(dense.stack.layers)} layers as one call"
    object.__setattr__(model, _REFRESHERS, refreshers)
    kernels = extension.load()
    summary = (
        f"CPU kernels ({kernels.isa if kernels else 'none'}) under {type(model).__name__}: {done}; "
        f"LM head {head}; packed{' as int8' if int8 else ''} in {time.monotonic() - start:.1f} s"
    )
    logger.info(summary)
    return summary


def stack_of(model: nn.Module) -> DecoderStack | None:
    """What computes the layers of a causal LM in one call; None where it goes layer by layer."""
    dense = getattr(getattr(model, "model", model), _DENSE, None)
    return None if dense is None else dense.stack


def refresh(model: nn.Module) -> None:
    """Pack the weights again after SGLang changed them."""
    for one in getattr(model, _REFRESHERS, ()):
        one()


def _install(inner: nn.Module, dense: DenseModel) -> None:
    """Compute the model's forward with the stack wherever it can, else with its own."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    original = inner.forward
    bound_to: list[Any] = [None]

    def forward(
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
        **more: Any,
    ) -> Any:
        backend = get_attn_backend()
        plan = getattr(backend, "plain_plan", None)
        if (
            plan is None
            or input_embeds is not None
            or pp_proxy_tensors is not None
            or more
            or getattr(inner, "layers_to_capture", None)
            or positions.dim() != 1
            or positions.numel() == 0
        ):
            if pp_proxy_tensors is not None:
                more["pp_proxy_tensors"] = pp_proxy_tensors
            return original(input_ids, positions, forward_batch, input_embeds, **more)
        pool = backend.token_to_kv_pool
        if bound_to[0] is not pool:
            ids = [layer.self_attn.attn.layer_id for layer in inner.layers]
            dense.stack.bind_pools(
                [(pool.get_key_buffer(i), pool.get_value_buffer(i)) for i in ids]
            )
            bound_to[0] = pool
        embeds = dense.embed(inner, input_ids)
        return dense.stack.run(embeds, positions, forward_batch.out_cache_loc, plan)

    object.__setattr__(inner, "forward", forward)
    object.__setattr__(inner, _DENSE, dense)


def _attach_head(model: nn.Module, refreshers: list[Callable[[], None]], int8: bool) -> str:
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    head = getattr(model, "lm_head", None)
    if head is None:  # Gemma hands its embeddings to the logits processor
        head = getattr(getattr(model, "model", None), "embed_tokens", None)
    if not isinstance(head, VocabParallelEmbedding) or (
        type(head.quant_method) is not UnquantizedEmbeddingMethod
        or head.tp_size != 1
        or not ops.supports(head.weight.dtype, head.weight.shape[1])
    ):
        return f"left to SGLang ({type(head).__name__})"
    packed = ops.pack(head.weight.data, int8=int8)

    class PackedHeadMethod(UnquantizedEmbeddingMethod):
        """The LM head over a packed weight, its logits in float32 without a rounding between."""

        def apply(
            self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return ops.linear(x.to(packed.dtype), packed, bias, out_dtype=torch.float32)

    head.quant_method = PackedHeadMethod()
    refreshers.append(lambda: ops.repack(packed, head.weight.data))
    return "packed"


def _attach_modules(
    model: nn.Module, refreshers: list[Callable[[], None]], int8: bool
) -> Counter[str]:
    from sglang.srt.layers import activation
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, LinearBase):
            try:
                dense_models.check_linear(module)
            except UnsupportedModelError:
                continue
            _attach_linear(module, refreshers, int8)
            counts["linear"] += 1
        elif type(module) in (activation.SiluAndMul, activation.GeluAndMul):
            _attach_activation(module)
            counts["activation"] += 1
        elif (
            isinstance(module, RotaryEmbedding)
            and type(module).forward_native is RotaryEmbedding.forward_native
        ):
            _attach_rope(module)
            counts["rotary"] += 1
        elif hasattr(module, "weight") and type(module).__name__.endswith("RMSNorm"):
            try:
                offset = dense_models.norm_offset(module)
            except UnsupportedModelError:
                continue
            _attach_norm(module, offset)
            counts["norm"] += 1
    return counts


def _attach_linear(linear: nn.Module, refreshers: list[Callable[[], None]], int8: bool) -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    packed = ops.pack(linear.weight.data, int8=int8)

    class PackedLinearMethod(UnquantizedLinearMethod):
        """A linear layer over a packed weight."""

        def apply(
            self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            if x.dtype != packed.dtype:
                return super().apply(layer, x, bias)
            return ops.linear(x, packed, bias)

    linear.quant_method = PackedLinearMethod()
    refreshers.append(lambda: ops.repack(packed, linear.weight.data))


def _attach_activation(module: nn.Module) -> None:
    kind = "silu"
    if hasattr(module, "approximate"):
        kind = "gelu_tanh" if module.approximate == "tanh" else "gelu"

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not ops.supports(x.dtype, 2) or x.stride(-1) != 1:
            return module.forward_native(x)
        return ops.gated(x, kind)

    object.__setattr__(module, "_forward_method", forward)


def _attach_norm(module: nn.Module, offset: float) -> None:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon

    def forward(
        x: torch.Tensor, residual: torch.Tensor | None = None, *more: Any, **named: Any
    ) -> Any:
        weight = module.weight.data
        odd = any(value is not None for value in more) or any(
            value is not None for key, value in named.items() if key != "quant_linear"
        )
        if (
            odd
            or not ops.supports(x.dtype, 2)
            or weight.dtype != x.dtype
            or x.stride(-1) != 1
            or (residual is not None and not residual.is_contiguous())
        ):
            named.pop("quant_linear", None)
            return module.forward_native(x, residual, *more, **named)
        out = ops.rms_norm(x, weight, eps, residual, offset)
        return out if residual is None else (out, residual)

    object.__setattr__(module, "_forward_method", forward)


def _attach_rope(module: nn.Module) -> None:
    def forward(
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        offsets: torch.Tensor | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = module.cos_sin_cache
        plain = (
            offsets is None
            and positions.dim() == 1
            and query.dim() == 2
            and key.dim() == 2
            and ops.supports(query.dtype, 2)
            and cache.dtype in (torch.float32, query.dtype)
            and not hasattr(module, "sin_cos_cache")
            and not any(value is not None for value in named.values())
        )
        if not plain:
            return module.forward_native(positions, query, key, offsets, **named)
        ops.rope(positions, query, key, cache, module.head_size, module.is_neox_style)
        return query, key

    object.__setattr__(module, "_forward_method", forward)
