"""Gemma."""

from __future__ import annotations

import torch

from stateful_sglang.cpu.families.base import MODELS, Family


def _root(hidden: int, _dtype: torch.dtype) -> float:
    return hidden**0.5


FAMILY = Family(f"{MODELS}.gemma", "GemmaModel", "Gemma", embedding_scale=_root)
