"""Qwen 2 and 2.5."""

from __future__ import annotations

from stateful_sglang.cpu.families.base import MODELS, Family

FAMILY = Family(f"{MODELS}.qwen2", "Qwen2Model", "Qwen2")
