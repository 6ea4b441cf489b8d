"""Checks of the machine: device, model cache, compiler, memory, port."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from stateful_sglang import cache_folder
from stateful_sglang.doctor.finding import INSTALL, Finding
from stateful_sglang.embedded import cache as models


def device() -> Finding:
    import torch

    from stateful_sglang.server import machine

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", "ok", ", ".join(names))
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding(
            "device",
            "note",
            "an NVIDIA driver is here, but torch is a CPU build: the CPU would serve",
            "to use the GPU: scripts/install --profile cuda --venv ANOTHER",
        )
    return Finding("device", "ok", f"CPU, {machine.usable_cores()} cores")


def model(cache_dir: Path | None) -> Finding:
    state = models.check(cache_dir)
    if state.problem is None:
        return Finding("model", "ok", f"{state.path.name}, converted")
    try:
        gguf = models.find_gguf(hashes=False)
    except models.ModelError as error:
        text, _, remedy = str(error).partition(": ")
        return Finding("model", "fail", f"{state.problem}, and {text}", remedy or INSTALL)
    return Finding(
        "model",
        "note",
        f"{state.problem}; {gguf.name} is converted at the first start",
        "to do it now: stateful-sglang model ensure",
    )


def writable_cache(cache_dir: Path | None) -> Finding:
    root = cache_folder.root(cache_dir)
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        complete = models.check(cache_dir).problem is None
        return Finding(
            "cache folder",
            "note" if complete else "fail",
            f"{root} cannot be written: {error.strerror}",
            f"name another folder with {cache_folder.ENV}",
        )
    free = shutil.disk_usage(existing).free
    if free < models.NEEDED_BYTES and models.check(cache_dir).problem is not None:
        return Finding(
            "cache folder",
            "fail",
            f"{root} has {free >> 20} MB free, {models.NEEDED_BYTES >> 20} are needed",
            f"free some space, or name another folder with {cache_folder.ENV}",
        )
    return Finding("cache folder", "ok", f"{root}, {free >> 30} GB free")


def compiler() -> Finding:
    from stateful_sglang.cpu import extension

    path = extension.find_compiler()
    if path is None:
        slower = "no C++ compiler: a CPU is served by torch's own operators, slower"
        return Finding("compiler", "note", slower, extension.GET_COMPILER)
    return Finding("compiler", "ok", path)


def kernels() -> Finding:
    import torch

    from stateful_sglang.cpu import extension

    if torch.cuda.is_available():
        return Finding("CPU kernels", "ok", "not used: there is a GPU")
    status = extension.status()
    if status.isa is None:
        return Finding("CPU kernels", "note", status.detail)
    return Finding("CPU kernels", "ok", f"{status.isa}, {status.library}")


def memory(cache_dir: Path | None) -> Finding:
    from stateful_sglang.server import cpu_settings as device
    from stateful_sglang.server import machine

    here = machine.probe()
    free = f"{here.free_memory / (1 << 30):.1f} GiB free"
    config = models.model_path(cache_dir) / "config.json"
    if not config.is_file():
        return Finding("memory", "ok", free)
    weights = sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
    shape = device.model_shape(json.loads(config.read_text()), weights, "bfloat16")
    try:
        choices = device.choose(here, shape, device.Wanted())
    except device.NotEnoughMemoryError as error:
        return Finding("memory", "fail", str(error).split(". ")[0], "free some memory")
    pool = choices["max_total_tokens"].value
    return Finding("memory", "ok", f"{free}: room for {pool} tokens of the default model's KV")


def port(port: int) -> Finding:
    from stateful_sglang.server import machine
    from stateful_sglang.server.address import DEFAULT_HOST

    if port == 0:
        return Finding("port", "ok", "any free one")
    problem = machine.port_problem(DEFAULT_HOST, port)
    if problem is not None:
        return Finding(
            "port",
            "fail",
            f"{DEFAULT_HOST}:{port}: {problem}",
            "stop what is using it, or serve on another with --port",
        )
    return Finding("port", "ok", f"{port} is free")
