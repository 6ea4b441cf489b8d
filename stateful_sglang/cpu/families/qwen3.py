"""Qwen 3."""

from __future__ import annotations

from stateful_sglang.cpu.families.base import MODELS, Family

FAMILY = Family(f"{MODELS}.qwen3", "Qwen3Model", "Qwen3", mlp_module=f"{MODELS}.qwen2")
