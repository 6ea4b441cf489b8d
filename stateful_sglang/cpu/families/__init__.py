"""Families of dense models that the decoder stack computes in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stateful_sglang.registry import Entry, Registry

if TYPE_CHECKING:
    from stateful_sglang.cpu.families.base import Family

FAMILIES: Registry[Family] = Registry(
    "model family",
    __name__,
    {
        "llama": Entry("llama.FAMILY", "Llama, and Mistral, which SGLang computes by its classes"),
        "qwen2": Entry("qwen2.FAMILY", "Qwen 2 and 2.5"),
        "qwen3": Entry("qwen3.FAMILY", "Qwen 3"),
        "gemma": Entry("gemma.FAMILY", "Gemma"),
        "gemma2": Entry("gemma2.FAMILY", "Gemma 2"),
        "gemma3": Entry("gemma3.FAMILY", "Gemma 3, text"),
    },
)


def family_of(class_name: str) -> Family | None:
    """The family whose model class has this full name; None for a model the stack doesn't know."""
    families = (FAMILIES.load(name) for name in FAMILIES)
    return next((f for f in families if class_name == f"{f.module}.{f.model}"), None)
