"""On the CPU engine, sessions with drafts say what fresh requests without drafts say, by family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stateful_sglang.cpu import extension

pytestmark = pytest.mark.skipif(extension.load() is None, reason="no C++ compiler")

ARM = Path(__file__).with_name("cpu_family_arm.py")
FAMILIES = (
    "llama",
    "qwen3",
    "qwen3-moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
)


@pytest.fixture(scope="module")
def comparisons() -> dict[str, dict[str, Any]]:
    """What the arm found of every family; one process for all, because it imports for seconds."""
    done = subprocess.run(
        [sys.executable, str(ARM), *FAMILIES], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["family"]: row for row in rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_with_drafts_say_what_fresh_requests_say(
    family: str, comparisons: dict[str, dict[str, Any]]
) -> None:
    found = comparisons[family]
    assert found["differing"] == []
    assert found["tokens"] == found["turns"] * found["asked"]
    # Some drafts were right, or nothing was verified; some were wrong, or nothing was refused.
    assert found["fewest_steps"] < found["steps"] < found["tokens"] - found["turns"]
