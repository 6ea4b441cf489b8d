"""SGLang's model families over our kernels equal transformers, before and after a weight update."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stateful_sglang.cpu import extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(extension.load() is None, reason="no C++ compiler"),
]

ARM = Path(__file__).with_name("cpu_model_arm.py")


def run_arm(*arguments: str) -> dict[str, Any]:
    """What the arm printed."""
    done = subprocess.run(
        [sys.executable, str(ARM), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", ["stack", "modules"])
def test_int8_weights_are_near_and_follow_an_update(path: str) -> None:
    result = run_arm("llama", path, "int8")
    assert "as int8" in result["said"][0]
    # Rounding shows, so int8 was used; random layers amplify it. Without the update the error would
    # be that of another model, above 1.
    assert 1e-3 < result["error"] < 0.3
    assert 1e-3 < result["error_after_update"] < 0.3


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "stack"),
        ("llama-rope-scaled", "stack"),
        ("mistral", "stack"),
        ("qwen2", "stack"),
        ("qwen3", "stack"),
        ("gemma2", "stack"),
        ("gemma3", "stack"),
        ("llama", "modules"),
        ("qwen3", "modules"),
        ("gemma2", "modules"),
    ],
)
def test_family_equals_transformers(family: str, path: str) -> None:
    result = run_arm(family, path)
    kind = "as one call" if path == "stack" else "layer by layer"
    assert kind in result["said"][0]
    assert result["error"] < 1e-5
    assert result["error_after_update"] < 1e-5
    assert result["differing"] == result["differing_after_update"] == 0
