"""Gemma 2."""

from __future__ import annotations

import torch

from stateful_sglang.cpu.families.base import MODELS, Family


def _rounded_root(hidden: int, dtype: torch.dtype) -> float:
    return torch.tensor(hidden**0.5, dtype=dtype).item()


FAMILY = Family(f"{MODELS}.gemma2", "Gemma2Model", "Gemma2", embedding_scale=_rounded_root)
