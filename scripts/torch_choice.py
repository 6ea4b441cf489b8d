"""Which torch a machine gets. Standard library only: this runs before anything is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = Path(__file__).resolve().parent.parent / "stateful_sglang" / "requirements"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the PyTorch project documents its CPU builds."""
ACCELERATOR_PACKAGES = ("nvidia-", "cuda-", "triton")


class InstallError(Exception):
    """A stage failed; the message is for a person."""


class TorchChoice(NamedTuple):
    """Which torch to install."""

    requirement: str
    index: str | None
    """An index to ask beside those of the user's pip."""
    note: str | None
    """What a person should know about the choice."""


def requirements(file: str) -> list[str]:
    """The lines of a requirements file without comments."""
    lines = (REQUIREMENTS / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pinned(file: str) -> str:
    """The single requirement in a requirements file."""
    (line,) = requirements(file)
    return line


def detect_profile() -> str:
    """`cuda` where an NVIDIA driver lists a GPU, else `cpu`."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    try:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def choose_cpu_torch(resolve: Callable[..., list[str] | None], index: str | None) -> TorchChoice:
    """The torch for a machine without a GPU: a CPU build wherever one can be found.

    `resolve(requirement, index=..., deps=...)` gives the names that pip would install, or None.
    """
    base = pinned("torch.txt")
    cpu_build = f"{base}+cpu"
    for extra in (index, None) if index else (None, PYTORCH_CPU_INDEX):
        if resolve(cpu_build, index=extra, deps=False) is not None:
            return TorchChoice(cpu_build, extra, None)
    names = resolve(base, index=index, deps=True)
    if names is None:
        raise InstallError(f"no {base} was found on any index that pip is set up for")
    if any(name.startswith(ACCELERATOR_PACKAGES) for name in names):
        note = (
            f"no CPU build of {base} was found, only the CUDA build: going on with that "
            "(several GB more). --torch-index-url names an index with a CPU build."
        )
        return TorchChoice(base, index, note)
    return TorchChoice(base, index, None)
