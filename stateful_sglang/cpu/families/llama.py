"""Llama."""

from __future__ import annotations

from stateful_sglang.cpu.families.base import MODELS, Family

FAMILY = Family(f"{MODELS}.llama", "LlamaModel", "Llama")
