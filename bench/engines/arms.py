"""The engines that a bench compares: how each is started here at its best, and asked.

An arm yields a client of its running server. What cannot be started says why; it is reported, not
left out.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.engines.load import LlamaCppDialect, Load, OpenAIDialect, SGLangDialect
from bench.harness.limits import ModelCost, model_cost
from bench.harness.server import serve, serve_command

POOL_TOKENS = 131_072
"""KV that every arm gets: 16 requests of 8,192 tokens."""
CONTEXT = 8192
REQUESTS = 16
VLLM_START_S = 900.0
"""It compiles the model when it starts for the first time."""
VLLM_KV_GIB = 4
"""Holds POOL_TOKENS of the embedded model, which takes 22.5 KiB a token."""


class ArmUnavailableError(RuntimeError):
    """An arm cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a run share."""

    model: Path
    """Checkpoint folder."""
    peers: Path
    """Folder that scripts/peers filled."""
    threads: int
    """Compute threads of every arm."""

    def peer(self, name: str) -> dict[str, str]:
        """What scripts/peers says of a peer.

        Raises:
            ArmUnavailableError: It was not set up.
        """
        listing = self.peers / "peers.json"
        found = json.loads(listing.read_text()) if listing.exists() else {}
        if name not in found:
            raise ArmUnavailableError(
                f"{name} is not in {self.peers}: run scripts/peers {name}, or name the folder that "
                "holds it with --peers"
            )
        return found[name]

    def cost(self) -> ModelCost:
        """Of the checkpoint, in bf16."""
        return model_cost(json.loads((self.model / "config.json").read_text()))


Started = contextlib.AbstractContextManager[Load]


@dataclass(frozen=True)
class Arm:
    """An engine in one setting."""

    name: str
    what: str
    """For people: engine, version where it is not ours, format of the weights."""
    start: Callable[[Setting], Started]
    cost: Callable[[Setting], ModelCost] = Setting.cost
    """What its model costs: quantised weights are fewer bytes."""


def _ours(*more: str) -> Callable[[Setting], Started]:
    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Load]:
        pool = ("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", str(REQUESTS))
        model = ("--model-path", str(setting.model), "--context-length", str(CONTEXT))
        threads = {"OMP_NUM_THREADS": str(setting.threads)}
        with serve("--stateful", "off", *model, *pool, *more, env=threads) as server:
            yield Load(server.url, SGLangDialect())

    return start


@contextlib.contextmanager
def _stock(setting: Setting) -> Iterator[Load]:
    arguments = {
        "--model-path": str(setting.model),
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--dtype": "bfloat16",
        "--context-length": str(CONTEXT),
        "--max-total-tokens": str(POOL_TOKENS),
        "--max-running-requests": str(REQUESTS),
        "--mem-fraction-static": "0.95",
    }
    threads = {"OMP_NUM_THREADS": str(setting.threads)}
    command = [sys.executable, "-m", "bench.engines.stock", *_flat(arguments)]
    with serve_command(*command, env=threads) as server:
        yield Load(server.url, SGLangDialect())


@contextlib.contextmanager
def _vllm(setting: Setting) -> Iterator[Load]:
    peer = setting.peer("vllm")
    arguments = {
        "--model": str(setting.model),
        "--dtype": "bfloat16",
        "--max-model-len": str(CONTEXT),
        "--max-num-seqs": str(REQUESTS),
        "--host": "127.0.0.1",
    }
    command = [peer["python"], "-m", "vllm.entrypoints.openai.api_server", *_flat(arguments)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": _bound_cores(setting.threads),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(_preloaded(Path(peer["python"]).parent.parent)),
    }
    with serve_command(*command, env=environment, timeout_s=VLLM_START_S) as server:
        yield Load(server.url, OpenAIDialect(str(setting.model)))


def _preloaded(environment: Path) -> list[str]:
    """The libraries that vLLM's manual wants loaded first, as far as they are here.

    Intel's OpenMP comes with vLLM; tcmalloc is the system's (Debian: libtcmalloc-minimal4).
    """
    openmp = environment / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return [*([tcmalloc] if tcmalloc else []), *([str(openmp)] if openmp.exists() else [])]


def _llama_cpp(find: Callable[[Setting], Path]) -> Callable[[Setting], Started]:
    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Load]:
        arguments = {
            "--model": str(find(setting)),
            "--ctx-size": str(POOL_TOKENS),
            "--parallel": str(REQUESTS),
            "--threads": str(setting.threads),
            "--threads-batch": str(setting.threads),
            # Prompts of earlier cells would be copied out of their slots and back.
            "--cache-ram": "0",
            "--host": "127.0.0.1",
        }
        with serve_command(setting.peer("llamacpp")["server"], *_flat(arguments)) as server:
            yield Load(server.url, LlamaCppDialect())

    return start


def _bf16_gguf(setting: Setting) -> Path:
    from bench.engines.bf16_gguf import ensure

    return ensure(setting.peers / "models")


def _int8_cost(setting: Setting) -> ModelCost:
    return setting.cost()._replace(element_bytes=1.0)


def _q4_gguf(setting: Setting) -> Path:
    from stateful_sglang.embedded.cache import find_gguf

    return find_gguf()


def _q4_cost(setting: Setting) -> ModelCost:
    bf16 = setting.cost()
    parameters = bf16.linear_parameters + bf16.head_parameters
    return bf16._replace(element_bytes=_q4_gguf(setting).stat().st_size / parameters)


def _flat(arguments: dict[str, str]) -> list[str]:
    return [word for pair in arguments.items() for word in pair]


def _bound_cores(threads: int) -> str:
    """vLLM's way to say how many threads, each bound to a core."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("ours", "this package, --stateful off, bf16", _ours()),
        Arm("stock", "SGLang with stand-in ops only, bf16", _stock),
        Arm("vllm", "vLLM's CPU build, bf16", _vllm),
        Arm("llamacpp-bf16", "llama.cpp, bf16 GGUF", _llama_cpp(_bf16_gguf)),
        Arm("ours-int8", "likewise, int8 weights", _ours("--cpu-quant", "int8"), _int8_cost),
        Arm("llamacpp-q4", "llama.cpp, Q4_1 GGUF", _llama_cpp(_q4_gguf), _q4_cost),
    )
}
