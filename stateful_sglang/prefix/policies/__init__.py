"""Orders of eviction by name: what ``--eviction-policy`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stateful_sglang.registry import Entry, Registry

if TYPE_CHECKING:
    from stateful_sglang.prefix.policies.base import EvictionPolicy

POLICIES: Registry[type[EvictionPolicy]] = Registry(
    "eviction policy",
    __name__,
    {
        "cardinal": Entry("cardinal.Cardinal", "what no session needs, then what few need"),
        "lru": Entry("lru.Lru", "what was used longest ago, sessions and pins ignored"),
    },
)

DEFAULT = "cardinal"
