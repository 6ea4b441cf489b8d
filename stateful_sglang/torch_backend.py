"""What torch calls at the end of ``import torch``: the entry point of group ``torch.backends``.

On a machine set up for the CPU, two packages keep SGLang from being imported at all: there is no
Triton, and torchvision's wheel for CUDA does not import beside a CPU build of torch. Our launcher
prepares its own processes (:mod:`stateful_sglang.cpu.platform`); this does it for every other one
of the environment, such as ``python -m sglang.bench_serving``, and only once the module is asked
for. A real Triton always comes first. Beside a CUDA or ROCm build of torch nothing happens.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def autoload() -> None:
    """Let this process find the stand-ins. Never raises: torch's import would fail with it."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        sys.meta_path.insert(0, _BeforeTorchvision())
        sys.meta_path.append(_AfterTriton())


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing, but prepares torch when torchvision is first looked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from stateful_sglang.cpu import platform

            platform.define_torchvision_schemas()


class _AfterTriton(importlib.abc.MetaPathFinder):
    """Asked last, so only where there is no real Triton."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "triton":
            return None
        from stateful_sglang.cpu.standin import triton

        return triton.find(name)
