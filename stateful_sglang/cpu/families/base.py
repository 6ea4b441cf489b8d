"""What the decoder stack must be told of one of SGLang's dense models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MODELS = "sglang.srt.models"
"""Where SGLang's models are."""


@dataclass(frozen=True)
class Family:
    """The classes of one of SGLang's models, by name, and what it does to embeddings.

    A class is named here only after it was read: the stack computes what SGLang's classes of these
    names do, and a model with any other class in it is left to the layer-by-layer path.
    """

    module: str
    """Of the model, and of its layer, attention and (but for `mlp_module`) MLP classes."""
    model: str
    """The class below the causal LM that holds embeddings, layers and the last norm."""
    prefix: str
    """Of the layer, attention and MLP classes."""
    embedding_scale: Callable[[int, torch.dtype], float] | None = None
    """By what embeddings are multiplied, from the hidden size and the model's dtype."""
    mlp_module: str | None = None
    """Where the MLP class is, if the family borrows Qwen 2's."""
