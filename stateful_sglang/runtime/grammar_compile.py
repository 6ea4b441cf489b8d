"""Grammars are compiled where nobody else wants the processor.

SGLang compiles in threads of the scheduler's process, eight a grammar, and a schema of thousands of
properties takes them half a minute of two processors. They hold no GIL meanwhile, but share the
processors with the steps of all who decode: each step then waits for its slices. So the compiler's
calls run on threads of the idle class, which any other thread displaces at once.

Only these calls do. What SGLang computes around them in Python stays on its own threads: a thread
that nobody lets run must not hold the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from stateful_sglang.attachments.check import Attachment

_BACKEND = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend"
_INIT = f"{_BACKEND}.__init__"
_FRAMING = f"{_BACKEND}._new_framing_compiler"
ATTACHMENTS = (
    Attachment(_INIT, "hook", "the grammar compiler's calls give way to whoever decodes"),
    Attachment(_FRAMING, "hook", "likewise those of the compiler that frames a grammar"),
    Attachment(
        "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.get_cached_or_future_value",
        "relies",
        "a grammar is compiled on a thread of the backend's executor: it may wait for ours",
    ),
)


class GivingWay:
    """A grammar compiler whose ``compile_*`` calls run on threads of the idle class.

    Threads that the compiler starts inherit the class. The rest is the compiler's own.
    """

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(
            thread_name_prefix="grammar-compiler", initializer=_give_way
        )

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._compiler, name)
        return self._elsewhere(method) if name.startswith("compile_") else method

    def _elsewhere(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._threads.submit(method, *args, **kwargs).result()

        return call


def attach() -> None:
    """Register the hooks; they hold for SGLang's own routes too."""
    HookRegistry.register(_INIT, _replace_compiler, HookType.AFTER)
    HookRegistry.register(_FRAMING, _wrap_framing_compiler, HookType.AFTER)


def _replace_compiler(_result: None, backend: Any, *_args: Any, **_kwargs: Any) -> None:
    backend.grammar_compiler = GivingWay(backend.grammar_compiler)


def _wrap_framing_compiler(compiler: Any, *_args: Any, **_kwargs: Any) -> GivingWay:
    return GivingWay(compiler)


def _give_way() -> None:
    """Put the calling thread, and those it will start, into the idle class."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # Some sandboxes forbid the call; the least share is the next best.
        os.setpriority(os.PRIO_PROCESS, 0, 19)
