"""For which models and requests several tokens may be verified in one step."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.managers.schedule_batch import Req


def why_never(model_runner: Any) -> str | None:
    """What keeps every request of this model from drafting, if anything does."""
    config = model_runner.model_config
    if config.model_is_mrope:
        return "multi-dimensional positions"
    if mambaish_config(config) is not None:
        return "recurrent state that cannot be rolled back"
    if model_runner.lora_manager is not None:
        return "LoRA adapters"
    return None


def may_draft(req: Req) -> bool:
    """Whether a request's tokens may be verified in one step without changing what it says.

    Penalties and custom processors change with every token, and SGLang counts one token a step. A
    client refuses drafts for one request with ``"custom_params": {"draft": "off"}``.
    """
    sampling = req.sampling_params
    return (
        sampling.frequency_penalty == 0.0
        and sampling.presence_penalty == 0.0
        and sampling.repetition_penalty == 1.0
        and len(req.output_ids) >= sampling.min_new_tokens
        and req.custom_logit_processor is None
        and req.input_embeds is None
        and req.multimodal_inputs is None
        and not req.return_routed_experts
        and (sampling.custom_params or {}).get("draft") != "off"
    )
