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


class TorchBuild(NamedTuple):
    """A release of torch that SGLang accepts."""

    torch: str
    torchvision: str


class TorchChoice(NamedTuple):
    """Which torch to install."""

    requirement: str
    torchvision: str
    """The release that was built for it."""
    index: str | None
    """An index to ask beside those of the user's pip."""
    note: str | None
    """What a person should know about the choice."""


def requirements(file: str) -> list[str]:
    """The lines of a requirements file without comments."""
    lines = (REQUIREMENTS / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def torch_builds() -> list[TorchBuild]:
    """What may be installed, newest first; the first one is what SGLang pins."""
    return [TorchBuild(*line.split()) for line in requirements("torch-builds.txt")]


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
    """The torch for a machine without a GPU: the newest CPU build that can be found.

    The CUDA build is several GB of what no CPU calls, so an older release with a CPU build is
    better. `resolve(requirement, index=..., deps=...)` gives the names that pip would install, or
    None.
    """
    builds = torch_builds()
    pinned = builds[0].torch
    instead = f"no CPU build of {pinned}, which SGLang pins, was found: "
    for build in builds:
        cpu_build = f"{build.torch}+cpu"
        for extra in (index, None) if index else (None, PYTORCH_CPU_INDEX):
            if resolve(cpu_build, index=extra, deps=False) is not None:
                note = None if build.torch == pinned else f"{instead}{cpu_build} serves as well"
                return TorchChoice(cpu_build, build.torchvision, extra, note)
    for build in builds:
        names = resolve(build.torch, index=index, deps=True)
        if names is None:
            continue
        note = None
        if any(name.startswith(ACCELERATOR_PACKAGES) for name in names):
            note = (
                f"no CPU build of torch was found, only the CUDA build of {build.torch}: going on "
                "with that (several GB more). --torch-index-url names an index with a CPU build."
            )
        elif build.torch != pinned:
            note = f"{instead}{build.torch} serves as well"
        return TorchChoice(build.torch, build.torchvision, index, note)
    accepted = ", ".join(build.torch for build in builds)
    raise InstallError(f"none of {accepted} was found on any index that pip is set up for")
