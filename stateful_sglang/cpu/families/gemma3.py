"""Gemma 3."""

from __future__ import annotations

from stateful_sglang.cpu.families.base import MODELS, Family

FAMILY = Family(f"{MODELS}.gemma3_causal", "Gemma3TextModel", "Gemma3")
