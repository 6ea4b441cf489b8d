"""What must be true of a process before it imports SGLang on a machine without an accelerator.

`prepare` is called by every process of the server (main, spawned scheduler, spawned detokenizer)
before ``import sglang``. Where real packages do the job it does nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_TORCHVISION_OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Ops whose schema torchvision's Python side needs at import, from torchvision's ops.cpp."""


class Prepared(NamedTuple):
    """What `prepare` did in this process."""

    cpu_engine: bool
    """SGLang is told to run on the CPU."""
    torchvision_schemas: bool
    """Schemas were defined because torchvision's own ops cannot be loaded."""
    standin_kernel: bool
    """``sgl_kernel`` is our stand-in."""
    standin_triton: bool = False
    """``triton`` is our stand-in."""


@functools.cache
def prepare() -> Prepared:
    """Make ``import sglang`` work here; safe to call any number of times.

    Raises:
        RuntimeError: SGLang was imported already, so that it has made its choices without us.
    """
    schemas = define_torchvision_schemas()
    if has_accelerator():
        return Prepared(cpu_engine=False, torchvision_schemas=schemas, standin_kernel=False)
    if "sglang.srt.utils.common" in sys.modules and os.getenv("SGLANG_USE_CPU_ENGINE") != "1":
        raise RuntimeError(
            "sglang was imported before stateful_sglang.cpu.platform.prepare(); it has already "
            "decided that this machine has no CPU engine. Import stateful_sglang first, or set "
            "SGLANG_USE_CPU_ENGINE=1."
        )
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # SGLang compiles small functions (penalties, for one) with torch.compile: here that takes a C++
    # compiler and seconds in the middle of a request, to save microseconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return Prepared(
        cpu_engine=True,
        torchvision_schemas=schemas,
        standin_kernel=_install_standin_kernel(),
        standin_triton=_install_standin_triton(),
    )


@functools.cache
def has_accelerator() -> bool:
    """Whether torch finds any device but the CPU (CUDA, ROCm, XPU, MPS, ...)."""
    return torch.accelerator.is_available()


def has_real_sgl_kernel() -> bool:
    """Whether an ``sgl_kernel`` that is not ours is installed."""
    module = sys.modules.get("sgl_kernel")
    if module is not None:
        return not getattr(module, "IS_STANDIN", False)
    return importlib.util.find_spec("sgl_kernel") is not None


def _install_standin_kernel() -> bool:
    module = sys.modules.get("sgl_kernel")
    if module is not None:
        return bool(getattr(module, "IS_STANDIN", False))
    if has_real_sgl_kernel():
        return False
    # Submodules (sgl_kernel.speculative) are then found through the package's __path__.
    sys.modules["sgl_kernel"] = importlib.import_module("stateful_sglang.cpu.standin.sgl_kernel")
    return True


def _install_standin_triton() -> bool:
    if "triton" in sys.modules:
        return bool(getattr(sys.modules["triton"], "IS_STANDIN", False))
    from stateful_sglang.cpu.standin import triton

    found = importlib.util.find_spec("triton")
    if found is not None:
        return triton.answers(found)
    triton.install()
    return True


def define_torchvision_schemas() -> bool:
    """Give torchvision the op schemas it registers meta functions for, if it has none itself.

    The wheel for CUDA cannot load its library beside a CPU build of torch, and its import then
    fails on two undefined ops.
    """
    library = _torchvision_library()
    if library is None or _loads(library):
        return False
    defined = False
    for name, schema in _TORCHVISION_OPS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
            defined = True
    return defined


def _torchvision_library() -> Path | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for suffix in (".so", ".pyd", *importlib.machinery.EXTENSION_SUFFIXES):
            candidate = Path(folder) / f"_C{suffix}"
            if candidate.is_file():
                return candidate
        return Path(folder) / "_C"
    return None


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except (OSError, ImportError):
        return False
    return True
