"""A model of one layer with random weights: its server costs what sessions cost, and little more.

Its tokenizer is the embedded model's. Start a server of it with `ARGUMENTS`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.engines import package

VOCABULARY = 49_152
_LAYERS, _HEADS, _HEAD_DIM = 1, 1, 64
_SHAPE = {
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEAD_DIM,
    "hidden_size": _HEADS * _HEAD_DIM,
    "intermediate_size": 2 * _HEADS * _HEAD_DIM,
}


def save(folder: Path, context_length: int) -> Path:
    """Write the model's description and its tokenizer; no weights, which the server makes up.

    Args:
        folder: Made if it is not there.
        context_length: Most tokens that the model is said to take.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = package.default_model()
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config |= {**_SHAPE, "max_position_embeddings": context_length}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def arguments(folder: Path, context_length: int, pool_tokens: int) -> tuple[str, ...]:
    """Of the launcher, for the model in `folder`, with a KV pool of so many tokens."""
    return (
        *("--model-path", str(folder), "--load-format", "dummy"),
        *("--context-length", str(context_length), "--max-total-tokens", str(pool_tokens)),
        *("--max-running-requests", "4", "--keys", "off"),
    )
