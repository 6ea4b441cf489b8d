"""The C++ kernels: compiled once with the system's compiler, cached, loaded, and told what to run.

The sources in `csrc/` have a C interface and need neither torch nor Python headers, so the build
takes seconds and depends on the compiler alone. The library holds one copy of the kernels for each
instruction set; `load` picks the best that this machine has.

Switches (environment):
  STATEFUL_SGLANG_CPU_ISA      `avx512`, `avx2` or `portable` force a path, `off` means no kernels.
  STATEFUL_SGLANG_CPU_LIBRARY  load this library in place of building one (scripts/sanitize).
  CXX                          the compiler to use.
  STATEFUL_SGLANG_CACHE        where the compiled library is kept, with the converted models
                               (--cache-dir; default: $XDG_CACHE_HOME or ~/.cache, stateful_sglang).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stateful_sglang import cache_folder

logger = logging.getLogger(__name__)

ISA_ENV = "STATEFUL_SGLANG_CPU_ISA"
LIBRARY_ENV = "STATEFUL_SGLANG_CPU_LIBRARY"
SOURCES = Path(__file__).parent / "csrc"
GET_COMPILER = (
    "install a C++17 compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) "
    "and start again"
)
_COMMON = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-strict-aliasing -fno-math-errno"
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Unit:
    """One object file of the library."""

    name: str
    source: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Extension:
    """The loaded kernels."""

    lib: ctypes.CDLL
    isa: str
    path: Path


@dataclass(frozen=True)
class Status:
    """What `stateful-sglang doctor` shows of the kernels."""

    compiler: str | None
    library: Path | None
    """Where the compiled library is, None if it has yet to be compiled."""
    isa: str | None
    """The path in use, None if the library can't be loaded or is switched off."""
    detail: str


def units(machine: str | None = None) -> list[Unit]:
    """The object files to compile for a processor family (`platform.machine()` by default)."""
    paths = [("portable", 4, "")]
    if (machine or platform.machine()) in ("x86_64", "AMD64"):
        paths += [("avx512", 16, _AVX512), ("avx2", 8, "-mavx2 -mfma")]
    kernels = [
        Unit(isa, "kernels.cpp", (f"-DSG_ISA={isa}", f"-DSG_LANES={lanes}", *flags.split()))
        for isa, lanes, flags in paths
    ]
    return [*kernels, Unit("dispatch", "dispatch.cpp", ()), Unit("sample", "sample.cpp", ())]


def find_compiler() -> str | None:
    """Path of the C++ compiler that a build would use."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _torch_openmp() -> Path | None:
    """torch's own OpenMP runtime: sharing it keeps one pool of threads in the process, not two."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    found = [
        path
        for folder in (root / "lib", root.parent / "torch.libs")
        for path in sorted(folder.glob("libgomp*.so*"))
    ]
    return found[0] if found else None


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else compiler


def library_path(compiler: str | None) -> Path:
    """Where the library for these sources, this compiler and this torch is cached."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((units(), _COMMON, str(_torch_openmp()))).encode())
    digest.update(_version(compiler).encode() if compiler else b"none")
    return cache_folder.root() / "ext" / digest.hexdigest()[:16] / "kernels.so"


def _say(message: str) -> None:
    logger.info(message)


def build(progress: Callable[[str], None] = _say) -> Path:
    """Compile the kernels unless the cache holds them; the path of the library.

    Processes that ask at once wait for one build. The library appears whole or not at all.

    Args:
      progress: told one line when a compile starts and one when it ends.
    Raises:
      BuildError: no compiler, or it failed.
    """
    compiler = find_compiler()
    target = library_path(compiler)
    if target.exists():
        return target
    if compiler is None:
        raise BuildError(f"No C++ compiler found for the CPU kernels: {GET_COMPILER}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        progress(f"Compiling the CPU kernels with {compiler}, once (about 20 s) ...")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            compile_library(compiler, built)
            os.replace(built, target)
        progress(f"CPU kernels compiled in {time.monotonic() - start:.0f} s: {target}")
    return target


def compile_library(compiler: str, target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile the sources to `target`; `extra` flags go to every compile and to the link.

    Raises:
      BuildError: the compiler failed; carries the end of its output.
    """

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(
                f"{' '.join(command)} failed; the CPU kernels are off:\n{done.stderr[-2000:]}"
            )

    def one(unit: Unit) -> str:
        out = str(target.parent / f"{unit.name}.o")
        source = str(SOURCES / unit.source)
        run([compiler, *_COMMON.split(), *unit.flags, *extra, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(one, units()))
    openmp = _torch_openmp()
    link = ["-fopenmp"] if openmp is None else [str(openmp)]
    run([compiler, "-shared", *objects, *extra, *link, "-lm", "-o", str(target)])


_lock = threading.Lock()
_loaded: Extension | None = None
_tried = False


def load(progress: Callable[[str], None] = _say) -> Extension | None:
    """The kernels, compiled first if need be; None where they can't be had or are switched off.

    The reason is logged once. Later calls return the same object at once.
    """
    global _loaded, _tried
    with _lock:
        if not _tried:
            _tried = True
            try:
                _loaded = _load(progress)
            except (BuildError, OSError) as error:
                logger.warning("%s\nUsing torch's own operations instead: slower.", error)
        return _loaded


def _load(progress: Callable[[str], None]) -> Extension | None:
    wanted = os.environ.get(ISA_ENV, "").strip().lower()
    if wanted == "off":
        logger.info("CPU kernels switched off by %s=off; using torch's own operations.", ISA_ENV)
        return None
    if wanted not in ("", "auto", "avx512", "avx2", "portable"):
        raise BuildError(
            f"{ISA_ENV}={wanted!r} is not known: use avx512, avx2, portable, auto or off."
        )
    given = os.environ.get(LIBRARY_ENV)
    path = Path(given) if given else build(progress)
    return open_library(path, "" if wanted == "auto" else wanted)


def open_library(path: Path, isa: str = "") -> Extension:
    """Load a compiled library and select a path in it ("": the best that runs here).

    Raises:
      BuildError: this processor lacks the instruction set, or the library is of other sources.
    """
    import torch  # noqa: F401  (its OpenMP runtime must be in the process before the kernels)

    from stateful_sglang.cpu import abi

    lib = ctypes.CDLL(str(path))
    abi.declare(lib)
    name = lib.sg_select(isa.encode())
    if name is None:
        raise BuildError(f"{ISA_ENV}={isa}: this processor does not have it.")
    return Extension(lib, name.decode(), path)


def status() -> Status:
    """What there is, without compiling anything."""
    compiler = find_compiler()
    path = library_path(compiler)
    if os.environ.get(ISA_ENV, "").strip().lower() == "off":
        return Status(compiler, path if path.exists() else None, None, f"off by {ISA_ENV}")
    if not path.exists():
        detail = "compiled at the first start" if compiler else f"no compiler: {GET_COMPILER}"
        return Status(compiler, None, None, detail)
    extension = load()
    if extension is None:
        return Status(compiler, path, None, "cannot be loaded; see the log")
    return Status(compiler, path, extension.isa, "ready")
