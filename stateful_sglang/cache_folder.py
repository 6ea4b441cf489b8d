"""The folder that converted models and compiled kernels are kept in."""

from __future__ import annotations

import os
from pathlib import Path

ENV = "STATEFUL_SGLANG_CACHE"


def root(chosen: Path | None = None) -> Path:
    """The folder of everything we cache: `chosen`, $STATEFUL_SGLANG_CACHE, or the XDG place."""
    override = chosen or os.environ.get(ENV)
    if override:
        return Path(override).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(xdg) / "stateful_sglang"
