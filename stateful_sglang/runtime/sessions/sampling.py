"""From our words for sampling to SGLang's parameters. Imports no SGLang."""

from __future__ import annotations

from typing import Any

from stateful_sglang.service.sampling import Constraint, Sampling

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "ignore_eos",
)
_NAMES = {name: name for name in _SAME_NAME} | {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}


def sampling_params(sampling: Sampling, constraint: Constraint | None) -> dict[str, Any]:
    """SGLang's parameters; what is None is left to SGLang's defaults."""
    params = {
        theirs: value
        for ours, theirs in _NAMES.items()
        if (value := getattr(sampling, ours)) is not None
    }
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if constraint is not None:
        params[constraint.kind] = constraint.text
    return params
