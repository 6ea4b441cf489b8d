"""What this machine can do at most: reading memory and matrix products, with all its cores.

Run as a process of its own, so that the bench's process keeps no compute threads:

    python -m bench.harness.machine
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness.limits import Rates

STREAM_BYTES = 1 << 30
"""Read at a time: far more than any cache holds."""
MATRICES = ((2048, 2048, 2048), (4096, 1024, 4096), (2048, 576, 3072), (2048, 1536, 576))
"""Rows, inner size and columns; large squares, and layers of the embedded model."""


def measure(threads: int, seconds: float = 5.0) -> Rates:
    """Rates of this machine, in a process with that many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.harness.machine", str(seconds)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return Rates(**json.loads(done.stdout.splitlines()[-1]))


def _best(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of one call: the limit is what the machine does undisturbed."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def _measure_here(seconds: float) -> Rates:
    import torch

    # Three ways to read the same memory: which one is not held up by arithmetic is the machine's
    # business, and the fastest is nearest to the limit.
    floats = torch.ones(STREAM_BYTES // 4)
    words = floats.view(torch.int64)
    matrix, vector = floats.view(-1, 4096), torch.ones(4096)
    readers = (words.sum, floats.sum, floats.max, lambda: torch.mv(matrix, vector))
    each = seconds / (len(readers) + 2 * len(MATRICES))
    read = max(STREAM_BYTES / _best(reader, each) for reader in readers)
    products = []
    for dtype in (torch.bfloat16, torch.float32):
        rates = []
        for rows, inner, columns in MATRICES:
            left = torch.randn(rows, inner, dtype=dtype)
            right = torch.randn(columns, inner, dtype=dtype)
            took = _best(functools.partial(torch.nn.functional.linear, left, right), each)
            rates.append(2.0 * rows * inner * columns / took)
        products.append(max(rates))
    return Rates(read, *products)


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    wanted = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    print(json.dumps(_measure_here(wanted)._asdict()))
