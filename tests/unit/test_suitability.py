"""A model is refused for what really is in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare
from stateful_sglang.server import cpu_settings as device
from stateful_sglang.server import suit, suitability
from stateful_sglang.server.errors import LaunchError

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
FALCON_MAMBA: dict[str, Any] = {
    "architectures": ["FalconMambaForCausalLM"],
    "model_type": "falcon_mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "conv_kernel": 4,
    "vocab_size": 128,
}
GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
"""As published: heads and vocabulary are the class's defaults."""


@pytest.fixture(scope="module", autouse=True)
def _sglang_imports() -> None:
    prepare()


def refusal(config: dict[str, Any], *, sessions: bool = True) -> str:
    found = suitability.refusal_on_cpu(config, sessions=sessions, real_kernels=False)
    assert found is not None
    return found


def test_a_state_space_model_lacks_kernels_not_a_field(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FALCON_MAMBA))
    with pytest.raises(LaunchError) as caught:
        suit.for_cpu({"model_path": str(tmp_path)}, {}, sessions=True)
    message = str(caught.value)
    assert "FalconMambaForCausalLM has layers with a running state (state_size 16)" in message
    assert "which SGLang has for GPUs" in message
    assert "num_attention_heads" not in message


@pytest.mark.parametrize(
    "extra",
    [
        {"mamba_d_state": 128},
        {"linear_conv_kernel_dim": 4},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"conv_L_cache": 3},
    ],
)
def test_so_does_a_model_in_which_some_layers_are_of_that_kind(extra: dict[str, Any]) -> None:
    assert "running state" in refusal({**LLAMA, **extra})
    assert "running state" in refusal({**LLAMA, "text_config": extra})


@pytest.mark.parametrize("name", ["BertModel", "Qwen3ForSequenceClassification", "XForMaskedLM"])
def test_a_model_without_text_has_no_sessions(name: str) -> None:
    assert "generates no text. Add --stateful off" in refusal({"architectures": [name]})


def test_a_class_that_fails_to_import_is_told_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name} needs cutlass")

    monkeypatch.setattr(suitability.importlib, "import_module", broken)
    message = refusal(dict(LLAMA))
    assert "cannot load LlamaForCausalLM" in message
    assert "sglang.srt.models.llama needs cutlass" in message


@pytest.mark.parametrize("config", [LLAMA, GEMMA_3, {"architectures": ["SomebodysForCausalLM"]}])
def test_what_can_be_served_is_not_refused(config: dict[str, Any]) -> None:
    assert suitability.refusal_on_cpu(config, sessions=True, real_kernels=False) is None


def test_sglangs_own_cpu_kernels_lift_the_refusal() -> None:
    config = {**LLAMA, "linear_conv_kernel_dim": 4}
    assert suitability.refusal_on_cpu(config, sessions=True, real_kernels=True) is None


def test_a_part_of_a_model_is_sized_with_its_types_defaults() -> None:
    shape = device.model_shape(suitability.with_defaults(GEMMA_3), None, "bfloat16")
    assert shape.kv_bytes_per_token == 2 * 34 * 4 * 256 * 2
    assert shape.sliding_window


def test_an_unknown_type_keeps_what_it_says() -> None:
    config = {"model_type": "somebodys", "num_hidden_layers": 3}
    assert suitability.with_defaults(config) == config


@pytest.mark.parametrize("name", ["text_config", "llm_config", "language_config"])
def test_the_language_model_is_found_in_a_model_of_several_parts(name: str) -> None:
    part = {"num_hidden_layers": 3}
    assert suitability.language_part({name: part, "vision_config": {}}) == part
    assert suitability.language_part({"thinker_config": {name: part}}) == part


def test_a_field_that_no_type_has_a_default_for_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "somebodys"}))
    with pytest.raises(LaunchError, match=r"no num_hidden_layers.*\(somebodys\)"):
        suit.for_cpu({"model_path": str(tmp_path)}, {})
