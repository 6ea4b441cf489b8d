"""Which model a server runs: one digest wherever its files lie, another for another model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.runtime.sessions.identity import model_digest


def model(path: Path, **changes: Any) -> str:
    """Write a model to a folder and digest it."""
    files = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "model.safetensors": "weights",
    } | changes.pop("files", {})
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    config = {"hidden_size": 8, "_name_or_path": str(path), "dtype": "float32"}
    config |= changes.pop("config", {})
    quantization = changes.pop("quantization", None)
    template = changes.pop("template", "{{ messages }}")
    cpu_quant = changes.pop("cpu_quant", None)
    assert not changes
    return model_digest(
        SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: config),
            quantization=quantization,
            model_path=str(path),
        ),
        SimpleNamespace(chat_template=template),
        None,
        cpu_quant=cpu_quant,
    )


def test_a_model_in_another_folder_or_of_another_rounding_is_the_same(tmp_path: Path) -> None:
    here = model(tmp_path / "here")
    assert here == model(tmp_path / "there")
    assert here == model(tmp_path / "half", config={"dtype": "bfloat16"})
    assert len(here) == 16
    assert int(here, 16) >= 0


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"hidden_size": 9}},
        {"quantization": "fp8"},
        {"cpu_quant": "int8"},
        {"template": "{{ messages | length }}"},
        {"files": {"tokenizer.json": "[]"}},
        {"files": {"model.safetensors": "other weights"}},
        {"files": {"model-2.safetensors": ""}},
        {"files": {"special_tokens_map.json": "{}"}},
    ],
)
def test_what_changes_tokens_changes_the_digest(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert model(tmp_path / "one") != model(tmp_path / "other", **changes)


def test_files_that_do_not_change_tokens_are_left_out(tmp_path: Path) -> None:
    assert model(tmp_path / "one") == model(tmp_path / "other", files={"README.md": "words"})


def test_a_tokenizer_that_lies_elsewhere_counts(tmp_path: Path) -> None:
    model(tmp_path / "one")
    model(tmp_path / "other", files={"tokenizer.json": "[]"})
    config = SimpleNamespace(hf_config=None, quantization=None, model_path=str(tmp_path / "one"))
    digests = {model_digest(config, None, str(tmp_path / name)) for name in ("one", "other")}
    assert len(digests) == 2


def test_a_model_whose_files_are_not_here_is_known_by_its_name() -> None:
    def named(name: str) -> str:
        config = SimpleNamespace(hf_config=None, quantization=None, model_path=name)
        return model_digest(config, None, None)

    assert named("nobody/has-this-model") == named("nobody/has-this-model")
    assert named("nobody/has-this-model") != named("nobody/has-that-model")
    assert named("not a name at all!") != named("nor/is/this/one")
