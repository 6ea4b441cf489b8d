"""How every bench ends: its figures printed, and written as a flat object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figure = int | float | None
"""None where it was not measured."""


def report(figures: Mapping[str, Figure], file: Path | None, **details: Any) -> None:
    """Print a line a figure; write them to `file`, as ``figures``, with the details beside them."""
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:{width}} {_shown(value)}", flush=True)
    if file is not None:
        file.write_text(json.dumps({"figures": dict(figures), **details}, indent=1) + "\n")
        print(f"written to {file}", flush=True)


def _shown(value: Figure) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"
