"""Which model a server runs, as far as a session's tokens depend on it.

A transcript is token ids: it means something to one vocabulary and one chat template only, and is
continued by the weights that wrote it. How those are rounded (data type, KV data type, device) is
left out, as a session may move between machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
)
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of a configuration that say where it lay, who wrote it, or how weights are rounded."""
_DIGITS = 16


def model_digest(
    model_config: Any,
    tokenizer: Any,
    tokenizer_path: str | None,
    revision: str | None = None,
    *,
    cpu_quant: str | None = None,
) -> str:
    """A digest of a model and its chat template, 16 hexadecimal digits.

    Reads the tokenizer's files and only the names and sizes of the weights, so that it takes some
    milliseconds. A model that lies in another folder has the same digest.

    Args:
        model_config: SGLang's, of which the model's own configuration and its place are used.
        tokenizer: With the chat template that the server renders; None where there is none.
        tokenizer_path: Folder or Hub name of the tokenizer; None: the model's.
        revision: Of a Hub name.
        cpu_quant: How our CPU engine stores the weights in place of their own form, if it does.
    """
    said = hashlib.sha256()

    def add(*parts: object) -> None:
        said.update(json.dumps(parts, sort_keys=True, default=str).encode() + b"\n")

    add("config", _without(_as_dict(getattr(model_config, "hf_config", None))))
    add("quantization", getattr(model_config, "quantization", None), cpu_quant)
    add("template", getattr(tokenizer, "chat_template", None))
    model_path = getattr(model_config, "model_path", None)
    for name, path, patterns in (
        ("tokenizer", tokenizer_path or model_path, _TOKENIZER_FILES),
        ("weights", model_path, _WEIGHT_FILES),
    ):
        if path is None:
            continue
        place = _local(path, revision)
        if place is None:
            add(name, path, revision)
            continue
        for file in _files(place, patterns):
            add(name, file.name, file.stat().st_size)
            if name == "tokenizer":
                said.update(file.read_bytes())
    return said.hexdigest()[:_DIGITS]


def _as_dict(config: Any) -> Any:
    return config.to_dict() if hasattr(config, "to_dict") else config


def _without(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {str(key): _without(value) for key, value in config.items() if key not in _NOT_THE_MODEL}


def _local(path: str, revision: str | None) -> Path | None:
    """Where the files of a folder, a file or a Hub name lie; None where that isn't known."""
    if (here := Path(path)).exists():
        return here
    try:
        known = try_to_load_from_cache(path, "config.json", revision=revision)
    except ValueError:  # neither a folder nor a name that the Hub could have
        return None
    return Path(known).parent if isinstance(known, str) else None


def _files(place: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    found = {file for pattern in patterns for file in place.glob(pattern) if file.is_file()}
    yield from sorted(found, key=lambda file: file.name)
