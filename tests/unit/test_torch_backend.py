"""Every process of the environment can import SGLang, whoever started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None,
    reason="stands in beside a CPU build of torch only",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds our entry points as an installation states them."""
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "entry_points_under_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-points-under-test\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\n"
        + "".join(f"{k} = {v}\n" for k, v in entry_points["torch.backends"].items())
    )
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def python(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=env
    )


@pytest.mark.parametrize("module", ["sglang.bench_serving", "sglang.launch_server"])
def test_sglangs_own_commands_start(module: str, installed: dict[str, str]) -> None:
    ran = python("-m", module, "--help", env=installed)
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout


def test_a_real_triton_comes_first(tmp_path: Path, installed: dict[str, str]) -> None:
    real = tmp_path / "triton"
    real.mkdir()
    (real / "__init__.py").write_text("REAL = True\n")
    code = "import torch, triton; print(triton.REAL)"
    ran = python("-c", code, env=installed)
    assert ran.stdout.strip() == "True", ran.stderr


def test_only_whoever_asks_for_it_pays(installed: dict[str, str]) -> None:
    code = (
        "import sys, torch; "
        "print([name for name in sys.modules if name.startswith(('triton', 'stateful_sglang.cpu', "
        "'torchvision'))])"
    )
    assert python("-c", code, env=installed).stdout.strip() == "[]"


def test_a_cuda_build_of_torch_is_left_alone() -> None:
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; before = list(sys.meta_path); "
        "from stateful_sglang.torch_backend import autoload; autoload(); "
        "print(before == sys.meta_path)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert python("-c", code, env=env).stdout.strip() == "True"
