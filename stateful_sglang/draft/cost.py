"""What verifying drafts costs on a device."""

from __future__ import annotations

from typing import NamedTuple


class VerifyCost(NamedTuple):
    """Time of a verify step, in plain decode steps: `1 + fixed + per_token * drafted`."""

    fixed: float
    per_token: float


CPU_COST = VerifyCost(fixed=0.10, per_token=0.03)
"""Weights dominate a CPU step and are read once for all rows: verifying 8 rows of the embedded
model took 1.2 to 1.4 plain steps on 2 cores."""

FULL_WIDTH_COST = VerifyCost(fixed=0.0, per_token=0.0)
"""With one width a step, a drafted token replaces padding: it costs nothing more."""
