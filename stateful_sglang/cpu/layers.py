"""Where the kernels of layers attach to SGLang: after a model is loaded, and after a weight update.

What they attach to a model is in `modules`; nothing here imports torch or SGLang before a model is
there.
"""

from __future__ import annotations

from typing import Any

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.cpu import extension

_SRT = "sglang.srt"
_UPDATER = f"{_SRT}.model_executor.model_runner_components.weight_updater.WeightUpdater"
_UPDATES = (
    "update_weights_from_disk",
    "load_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "end_weight_update",
)
_SAMPLE = f"{_SRT}.layers.sampler.sampling_from_probs_torch"
_FILTER = f"{_SRT}.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"
_LOAD = f"{_SRT}.model_executor.model_runner.ModelRunner.load_model"

ATTACHMENTS: tuple[Attachment, ...] = (
    Attachment(_SAMPLE, "hook", "tokens drawn on a CPU without exponential noise for every entry"),
    Attachment(_FILTER, "hook", "filtered tokens drawn on a CPU without a sort of the vocabulary"),
    Attachment(_LOAD, "hook", "after a model is loaded on a CPU its weights are packed"),
    *(
        Attachment(f"{_UPDATER}.{name}", "hook", "packed weights follow a weight update")
        for name in _UPDATES
    ),
    Attachment(
        f"{_SRT}.layers.linear._resolve_linear_group",
        "relies",
        "along which ranks a linear layer is cut: a packed weight must be a whole one",
    ),
    Attachment(
        f"{_SRT}.runtime_context.get_parallel",
        "relies",
        "how many ranks there are: linear layers do not say any more",
    ),
    Attachment(
        f"{_SRT}.layers.quantization.unquant.UnquantizedLinearMethod",
        "subclass",
        "a linear layer's product with its packed weight",
    ),
    Attachment(
        f"{_SRT}.layers.quantization.unquant.UnquantizedEmbeddingMethod",
        "subclass",
        "the LM head's product with its packed weight, in float32",
    ),
    Attachment(
        f"{_SRT}.layers.logits_processor.should_apply_lm_head_quant_method",
        "relies",
        "calls the LM head's method because its class name is a new one",
    ),
    *(
        Attachment(f"{_SRT}.{name}", "patch", reason)
        for name, reason in (
            ("models.llama.LlamaModel.forward", "replaced by the decoder stack: Llama, Mistral"),
            ("models.llama.LlamaDecoderLayer", "computed by the decoder stack"),
            ("models.llama.LlamaAttention", "computed by the decoder stack"),
            ("models.qwen2.Qwen2Model.forward", "replaced by the decoder stack"),
            ("models.qwen2.Qwen2DecoderLayer", "computed by the decoder stack"),
            ("models.qwen3.Qwen3Model.forward", "replaced by the decoder stack"),
            ("models.qwen3.Qwen3DecoderLayer", "computed by the decoder stack"),
            ("models.qwen3.Qwen3Attention", "computed by the decoder stack"),
            ("models.gemma.GemmaModel.forward", "replaced by the decoder stack"),
            ("models.gemma2.Gemma2Model.forward", "replaced by the decoder stack"),
            ("models.gemma2.Gemma2DecoderLayer", "computed by the decoder stack"),
            ("models.gemma3_causal.Gemma3TextModel.forward", "replaced by the decoder stack"),
            ("models.gemma3_causal.Gemma3DecoderLayer", "computed by the decoder stack"),
            ("models.gemma3_causal.Gemma3Attention", "computed by the decoder stack"),
            ("layers.layernorm.RMSNorm.forward_native", "computed by our kernel"),
            ("layers.layernorm.GemmaRMSNorm.forward_native", "computed by our kernel"),
            ("layers.layernorm.Gemma3RMSNorm.forward_native", "computed by our kernel"),
            ("layers.activation.SiluAndMul.forward_native", "computed by our kernel"),
            ("layers.activation.GeluAndMul.forward_native", "computed by our kernel"),
            (
                "layers.rotary_embedding.base.RotaryEmbedding.forward_native",
                "computed by our kernel",
            ),
        )
    ),
)


def attach(*, int8: bool = False) -> None:
    """Register the hooks; call it in a server process whose device is a CPU."""
    if extension.load() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from stateful_sglang.cpu import modules, sampling

    def loaded(result: Any, runner: Any, *_: Any, **__: Any) -> Any:
        if runner.device == "cpu":
            modules.attach_to_model(runner.model, int8=int8)
        return result

    def updated(result: Any, updater: Any, *_: Any, **__: Any) -> Any:
        modules.refresh(updater.get_model())
        return result

    HookRegistry.register(_SAMPLE, sampling.around_sample, HookType.AROUND)
    HookRegistry.register(_FILTER, sampling.around_filtered_sample, HookType.AROUND)
    HookRegistry.register(_LOAD, loaded, HookType.AFTER)
    for name in _UPDATES:
        HookRegistry.register(f"{_UPDATER}.{name}", updated, HookType.AFTER)
