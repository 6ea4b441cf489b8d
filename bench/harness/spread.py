"""Many times as a median and a tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.harness.figures import Figure


def milliseconds(name: str, seconds: Sequence[float]) -> dict[str, Figure]:
    """Median and 99th percentile, ``NAME_p50`` and ``NAME_p99``."""
    return {
        f"{name}_p{part}": round(float(np.percentile(seconds, part)) * 1e3, 3) for part in (50, 99)
    }
