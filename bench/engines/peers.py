"""The engines that ours is measured beside: how each is started here at its best."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench.engines import package
from bench.engines.arms import (
    CONTEXT,
    POOL_TOKENS,
    REQUESTS,
    Arm,
    Command,
    Setting,
    words,
)
from bench.engines.dialects import LlamaCppDialect, OpenAIDialect
from bench.harness.limits import ModelCost

VLLM_START_S = 900.0
"""It compiles the model when it starts for the first time."""
VLLM_KV_GIB = 4
"""Holds POOL_TOKENS of the embedded model, which takes 22.5 KiB a token."""


def _stock(setting: Setting) -> Command:
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
    return Command(
        (sys.executable, "-m", "bench.engines.stock", *words(arguments)),
        env={"OMP_NUM_THREADS": str(setting.threads)},
    )


def _vllm(setting: Setting) -> Command:
    peer = setting.peer("vllm")
    arguments = {
        "--model": str(setting.model),
        "--dtype": "bfloat16",
        "--max-model-len": str(CONTEXT),
        "--max-num-seqs": str(REQUESTS),
        "--host": "127.0.0.1",
    }
    return Command(
        (peer["python"], "-m", "vllm.entrypoints.openai.api_server", *words(arguments)),
        env={
            "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": _bound_cores(setting.threads),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(_preloaded(Path(peer["python"]).parent.parent)),
        },
        timeout_s=VLLM_START_S,
    )


def _preloaded(environment: Path) -> list[str]:
    """The libraries that vLLM's manual wants loaded first, as far as they are here.

    Intel's OpenMP comes with vLLM; tcmalloc is the system's (Debian: libtcmalloc-minimal4).
    """
    openmp = environment / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return [*([tcmalloc] if tcmalloc else []), *([str(openmp)] if openmp.exists() else [])]


def _bound_cores(threads: int) -> str:
    """vLLM's way to say how many threads, each bound to a core."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))


def _llama_cpp(find: Callable[[Setting], Path]) -> Callable[[Setting], Command]:
    def command(setting: Setting) -> Command:
        server = setting.peer("llamacpp")["server"]
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
        return Command((server, *words(arguments)))

    return command


def _bf16_gguf(setting: Setting) -> Path:
    from bench.engines.bf16_gguf import ensure

    return ensure(setting.peers / "models")


def _q4_gguf(setting: Setting) -> Path:
    return package.default_gguf()


def _q4_cost(setting: Setting) -> ModelCost:
    bf16 = setting.cost()
    parameters = bf16.linear_parameters + bf16.head_parameters
    return bf16._replace(element_bytes=_q4_gguf(setting).stat().st_size / parameters)


STOCK = Arm("stock", "SGLang with stand-in ops only, bf16", _stock)
VLLM = Arm("vllm", "vLLM's CPU build, bf16", _vllm, lambda s: OpenAIDialect(str(s.model)))
LLAMA_BF16 = Arm(
    "llamacpp-bf16", "llama.cpp, bf16 GGUF", _llama_cpp(_bf16_gguf), lambda _: LlamaCppDialect()
)
LLAMA_Q4 = Arm(
    "llamacpp-q4",
    "llama.cpp, Q4_1 GGUF",
    _llama_cpp(_q4_gguf),
    lambda _: LlamaCppDialect(),
    _q4_cost,
)
