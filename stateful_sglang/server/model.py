"""The model to serve: whether it is there, and what its configuration says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateful_sglang.embedded import cache
from stateful_sglang.server.errors import LaunchError

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def default(cache_dir: Path | None) -> Path:
    """The embedded model's folder, converted at the first start.

    Raises:
        LaunchError: It cannot be made.
    """
    try:
        return cache.ensure_default_model(cache_dir)
    except cache.ModelError as error:
        raise LaunchError(str(error)) from error


def check(path: str, load_format: str) -> None:
    """Look whether a local model is there, with weights; names of the hub are left to SGLang.

    Raises:
        LaunchError: It is not.
    """
    if "://" in path:
        return
    is_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") != 1
    if is_local and not Path(path).exists():
        raise LaunchError(
            f"--model-path {path} does not exist; expected a folder with config.json, tokenizer "
            "and weights, or the name of a model on the Hugging Face hub. Leave it out to serve "
            "the embedded default model"
        )
    if Path(path).is_dir() and stored_bytes(path) is None and load_format != "dummy":
        raise LaunchError(
            f"--model-path {path} holds no weights; expected {' or '.join(_WEIGHT_FILES)}. Copy "
            "them there, or download the model again"
        )


def configuration(path: str) -> Mapping[str, Any]:
    """A model's ``config.json``, downloaded where the model is on the hub.

    Raises:
        LaunchError: There is none, or it cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"--model-path {path} has no readable config.json: {str(error).splitlines()[0]}. "
            "Expected a folder with config.json, tokenizer and weights, or a model that can be "
            "downloaded"
        ) from error
    if not config:
        raise LaunchError(f"--model-path {path} has no config.json; expected a model's folder")
    return config


def stored_bytes(path: str) -> int | None:
    """Size of a local model's weights in bytes; None where there are none, or no such folder."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    for pattern in _WEIGHT_FILES:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None
