"""How every bench ends: its figures printed, and written as a flat object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figure = int | float | None
"""None where it was not measured."""


def report(figures: Mapping[str, Figure], file: Path | None, **details: Any) -> None:
    """Print a line a figure; write them to `file`, as ``figures``, with the details beside them.

    What JSON has no number for, such as the bound of an interval of one round, is written as null.
    """
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:{width}} {_shown(value)}", flush=True)
    write(figures, file, **details)
    if file is not None:
        print(f"written to {file}", flush=True)


def write(figures: Mapping[str, Figure], file: Path | None, **details: Any) -> None:
    """Write what there is so far, without a word."""
    if file is not None:
        flat = {name: value if _finite(value) else None for name, value in figures.items()}
        file.write_text(json.dumps({"figures": flat, **details}, indent=1) + "\n")


def _finite(value: Figure) -> bool:
    return value is not None and math.isfinite(value)


def _shown(value: Figure) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"
