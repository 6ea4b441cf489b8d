"""A scheduler keeps compiled grammars up to a bound: those used last, by SGLang's own backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.constrained.base_grammar_backend import (  # noqa: E402
    BaseGrammarBackend,
    InvalidGrammarObject,
)
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend  # noqa: E402

from stateful_sglang.runtime import grammar_cache  # noqa: E402


class Compiled:
    """A compiled grammar as SGLang caches it, of a size of one's choice."""

    def __init__(self, size: int) -> None:
        self.ctx = type("Context", (), {"memory_size_bytes": size})()

    def copy(self) -> Compiled:
        return self

    def maybe_init_reasoning(self, reasoning: bool) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[BaseGrammarBackend]:
    made = BaseGrammarBackend()
    grammar_cache._bound_cache(None, made)
    yield made
    made.executor.shutdown()


def kept(backend: BaseGrammarBackend, name: str) -> bool:
    """Whether SGLang finds this regular expression compiled; asking is a use."""
    return bool(backend.get_cached_or_future_value(("regex", name), False)[1])


def test_the_number_of_grammars_is_bounded_and_the_last_used_stay(
    backend: BaseGrammarBackend,
) -> None:
    backend.set_cache(("regex", "first"), Compiled(1))
    for number in range(2 * grammar_cache.MOST_GRAMMARS):
        backend.set_cache(("regex", str(number)), InvalidGrammarObject())
        assert kept(backend, "first")
    assert len(backend.cache) == grammar_cache.MOST_GRAMMARS
    assert not kept(backend, "0")


def test_their_bytes_are_bounded(backend: BaseGrammarBackend) -> None:
    for name in "abcd":
        backend.set_cache(("regex", name), Compiled(grammar_cache.MOST_BYTES // 3))
    assert [name for name in "abcd" if kept(backend, name)] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "size"),
    [("huge", grammar_cache.MOST_BYTES + 1), ("x" * (grammar_cache.MOST_KEY_CHARACTERS + 1), 1)],
)
def test_what_passes_the_bound_by_itself_is_not_kept_and_no_error(
    backend: BaseGrammarBackend, name: str, size: int
) -> None:
    backend.set_cache(("regex", "small"), Compiled(1))
    backend.set_cache(("regex", name), Compiled(size))
    assert not kept(backend, name)
    assert kept(backend, "small")


def test_a_flush_empties_it(backend: BaseGrammarBackend) -> None:
    backend.set_cache(("regex", "a"), Compiled(1))
    backend.reset()
    assert not kept(backend, "a")


def test_the_real_backend_compiles_within_the_bounds(
    smollm_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_cache, "MOST_BYTES", 4 << 20)
    monkeypatch.setattr(grammar_cache, "MOST_GRAMMARS", 8)
    backend = XGrammarGrammarBackend(smollm_tokenizer, vocab_size=len(smollm_tokenizer))
    grammar_cache._bound_cache(None, backend)
    grammar_cache._bound_compiler(None, backend)
    for number in range(40):
        key = ("json", f'{{"type": "object", "properties": {{"field{number}": {{}}}}}}')
        grammar = backend._init_value_dispatch(key, False)
        assert grammar_cache.size(grammar) > 0
        backend.set_cache(key, grammar.copy())
    assert len(backend.cache) <= 8
    assert backend.grammar_compiler.cache_limit_bytes == 4 << 20
    # The compiler says that it may pass its limit slightly: here by the grammar compiled last.
    assert backend.grammar_compiler.get_cache_size_bytes() < 6 << 20
    backend.executor.shutdown()


def test_the_hooks_are_where_sglang_makes_its_backends() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    before = dict(HookRegistry._hooks)
    grammar_cache.attach()
    targets = {row.target for row in grammar_cache.ATTACHMENTS if row.kind == "hook"}
    assert targets <= set(HookRegistry._hooks)
    HookRegistry._hooks.clear()
    HookRegistry._hooks.update(before)
