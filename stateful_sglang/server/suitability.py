"""Whether a model can be served here, and if not, what really is in the way."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where configurations of models with several parts keep the language model's."""
_RUNNING_STATE = (
    "state_size",
    "ssm_state_size",
    "ssm_cfg",
    "mamba_d_state",
    "mamba_state_dim",
    "linear_conv_kernel_dim",
    "linear_attn_config",
    "conv_L_cache",
)
"""Fields that only models with state-space, linear-attention or convolution layers have."""
_RUNNING_STATE_LAYERS = frozenset({"mamba", "mamba2", "linear_attention", "conv", "recurrent"})
_NO_TEXT = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_NO_TEXT_REASON = "its head rates its input and generates no text"


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the part that generates text: the whole, where there is one part."""
    for name in _LANGUAGE_PARTS:
        part = config.get(name)
        if isinstance(part, Mapping) and part:
            return language_part(part)
    return config


def with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with what its model type takes for granted, such as Gemma 3's heads.

    A ``config.json`` holds what differs from the defaults of its class. It is returned as it is
    where transformers doesn't know the class or cannot make sense of the rest.
    """
    from transformers import CONFIG_MAPPING

    try:
        known = CONFIG_MAPPING[config["model_type"]]
        filled: dict[str, Any] = known.from_dict(dict(config)).to_dict()
    except Exception:  # Remote code's own types, and whatever an odd file makes of a class.
        return config
    return {**filled, **{name: value for name, value in config.items() if name not in filled}}


def running_state(config: Mapping[str, Any]) -> str | None:
    """What tells that layers keep a running state instead of KV, None where all keep KV."""
    text = language_part(config)
    for name in _RUNNING_STATE:
        if text.get(name):
            return f"{name} {text[name]}" if isinstance(text[name], int) else name
    kinds = {str(kind) for kind in text.get("layer_types") or ()} & _RUNNING_STATE_LAYERS
    return f"layers of type {', '.join(sorted(kinds))}" if kinds else None


def generates_nothing(architectures: Sequence[str]) -> str | None:
    """Why a model of these architectures answers with no text, None where it does."""
    from sglang.srt.configs.model_config import is_generation_model

    for name in architectures:
        if name.endswith(_NO_TEXT):
            return _NO_TEXT_REASON
    if not is_generation_model(list(architectures)):
        return "it embeds or rates its input and generates no text"
    return None


def import_problem(architectures: Sequence[str]) -> str | None:
    """Why SGLang's class for the model cannot be loaded here, None where it can or there is none.

    SGLang itself passes over modules that fail to import, and then calls the architecture
    unsupported.
    """
    package = importlib.util.find_spec("sglang.srt.models")
    folders = (package.submodule_search_locations if package else None) or ()
    for name in architectures:
        wanted = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
        for file in sorted(path for folder in folders for path in Path(folder).glob("*.py")):
            if not wanted.search(file.read_text(encoding="utf-8")):
                continue
            try:
                importlib.import_module(f"sglang.srt.models.{file.stem}")
            except Exception as error:  # Whatever a module of SGLang raises keeps its model away.
                return f"{type(error).__name__}: {error}"
            return None
    return None


def refusal_on_cpu(config: Mapping[str, Any], *, sessions: bool, real_kernels: bool) -> str | None:
    """What a CPU server lacks for this model, as the end of a sentence; None where nothing.

    Args:
        config: ``config.json``.
        sessions: The server is to hold sessions.
        real_kernels: SGLang's own CPU kernels are installed, which know more layers than ours.
    """
    architectures = [str(name) for name in config.get("architectures") or ()]
    named = " or ".join(architectures) or "it"
    if sessions:
        reason = generates_nothing(architectures)
        if reason is not None:
            return f"{named} has no sessions: {reason}. Add --stateful off to serve it without"
    state = running_state(config)
    if state is not None and not real_kernels:
        return (
            f"{named} has layers with a running state ({state}): they need kernels for causal "
            "convolution and selective scan or linear attention, which SGLang has for GPUs and "
            "this package's CPU engine does not have. Serve it on a GPU, or a model whose layers "
            "are all attention here"
        )
    problem = import_problem(architectures)
    if problem is not None:
        return (
            f"SGLang cannot load {named} on this machine ({problem}). Install what is missing, or "
            "serve it on a GPU"
        )
    return None
