"""The plugin's settings: made once by the launcher, read in every server process.

SGLang spawns its processes and parses its own arguments only, so ours travel in one environment
variable as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

from stateful_sglang.draft import sources
from stateful_sglang.prefix import policies

ENV = "STATEFUL_SGLANG_CONFIG"


@dataclass(frozen=True)
class PluginConfig:
    """Settings of our plugin in one server."""

    stateful: bool = False
    """False: plain SGLang, with CPU support only."""
    pin_budget: float = 0.5
    """Largest share of the KV pool, 0 to 1, whose session leaves are pinned."""
    eviction_policy: str = policies.DEFAULT
    """Name of the order in which KV is evicted."""
    draft: str = sources.AUTO
    """Where drafts come from: a source's name, ``auto``, or ``off``."""
    max_draft: int = 8
    """Most tokens drafted for a request in one step."""
    content_tokens: Literal["text", "special"] = "text"
    """What special tokens spelled in the content of messages become, on the session routes."""
    cpu_quant: Literal["off", "int8"] = "off"
    """What the CPU kernels round a model's weights to."""

    quiet: bool = False
    """The user chose no log level: leave out what every start repeats."""

    def to_env(self) -> None:
        """Publish these settings to this process and to those it will spawn."""
        os.environ[ENV] = json.dumps(asdict(self))

    @classmethod
    def from_env(cls) -> PluginConfig | None:
        """Settings of this server, or None where our launcher did not start it."""
        raw = os.environ.get(ENV)
        return cls(**json.loads(raw)) if raw else None
