"""Compiling a grammar gives way to whoever decodes, and holds no GIL."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import xgrammar

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

from stateful_sglang.runtime import grammar_compile  # noqa: E402
from stateful_sglang.runtime.grammar_compile import GivingWay  # noqa: E402

VOCABULARY = [*(bytes([value]) for value in range(256)), b"<end>"]


class Recorder:
    """A compiler that says which thread and class its calls run in."""

    def compile_regex(self, regex: str) -> tuple[str, int, int, int]:
        with ThreadPoolExecutor(1) as own:
            started = own.submit(os.sched_getscheduler, 0).result()
        return regex, threading.get_ident(), os.sched_getscheduler(0), started

    def compile_grammar(self, grammar: str) -> None:
        raise RuntimeError(f"cannot read {grammar}")

    def clear_cache(self) -> int:
        return threading.get_ident()


def test_compiling_runs_in_the_idle_class_with_the_threads_it_starts() -> None:
    regex, thread, policy, inherited = GivingWay(Recorder()).compile_regex("a")
    assert regex == "a"
    assert thread != threading.get_ident()
    assert policy == inherited == os.SCHED_IDLE
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_the_compilers_own_refusal_arrives() -> None:
    with pytest.raises(RuntimeError, match="cannot read x"):
        GivingWay(Recorder()).compile_grammar("x")


def test_emptying_the_cache_waits_for_no_thread_that_gives_way() -> None:
    assert GivingWay(Recorder()).clear_cache() == threading.get_ident()


def test_sglangs_compilers_give_way_and_compile_what_they_did(monkeypatch: Any) -> None:
    info = xgrammar.TokenizerInfo(VOCABULARY, stop_token_ids=[256])
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    originals = ("__init__", "_new_framing_compiler")
    for name in originals:  # Put back what the hooks replace.
        monkeypatch.setattr(XGrammarGrammarBackend, name, XGrammarGrammarBackend.__dict__[name])
    grammar_compile.attach()
    HookRegistry.apply_hooks()

    class Tokenizer:
        def init_xgrammar(self) -> tuple[Any, None]:
            return info, None

    backend = XGrammarGrammarBackend(Tokenizer(), vocab_size=len(VOCABULARY))
    assert isinstance(backend.grammar_compiler, GivingWay)
    assert isinstance(backend._framing_compiler, GivingWay)
    schema = '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}'
    grammar = backend.dispatch_json(schema)
    for byte in b'{"a": 1}':
        grammar.accept_token(byte)
    mask = grammar.allocate_vocab_mask(len(VOCABULARY), 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    assert [t for t in range(257) if int(mask[0, t >> 5]) >> (t & 31) & 1] == [256]
    backend.reset()
