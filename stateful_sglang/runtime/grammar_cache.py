"""A bound on the compiled grammars that a scheduler keeps; SGLang keeps every one it ever saw.

A client that sends a new schema with each request would fill the machine's memory. What is thrown
out is compiled again when it comes again; requests that run hold their grammar themselves.
"""

from __future__ import annotations

from typing import Any

from cachetools import LRUCache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from stateful_sglang.attachments.check import Attachment

_BASE = "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend"
_XGRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend"
ATTACHMENTS = (
    Attachment(
        f"{_BASE}.__init__",
        "hook",
        "the cache of compiled grammars gets a bound: it was a dictionary that only grew",
    ),
    Attachment(
        f"{_BASE}.get_cached_or_future_value",
        "relies",
        "looks a grammar up with `get`, which makes it the one used last",
    ),
    Attachment(
        f"{_BASE}.set_cache",
        "relies",
        "keeps a grammar by assignment, and asks for it again only with `get`",
    ),
    Attachment(
        f"{_XGRAMMAR}.__init__",
        "hook",
        "the compiler's own cache gets a bound, beside SGLang's",
    ),
    Attachment(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar",
        "relies",
        "holds its compiled grammar as `ctx`, which knows its size",
    ),
    Attachment(
        "sglang.srt.constrained.reasoner_grammar_backend.ReasonerGrammarObject",
        "relies",
        "holds the grammar of the answer as `grammar`",
    ),
)
MOST_BYTES = 256 << 20
"""Of compiled grammars in SGLang's cache; and again in the compiler's, which shares most."""
MOST_GRAMMARS = 512
MOST_KEY_CHARACTERS = 256 << 10
"""Of a constraint as text; longer ones are compiled each time."""


def attach() -> None:
    """Register the hooks; they hold for SGLang's own routes too."""
    HookRegistry.register(f"{_BASE}.__init__", _bound_cache, HookType.AFTER)
    HookRegistry.register(f"{_XGRAMMAR}.__init__", _bound_compiler, HookType.AFTER)


class GrammarCache(LRUCache[tuple[str, str], Any]):
    """Compiled grammars by their text; what was used longest ago goes first."""

    def __init__(self) -> None:
        # Each counts as a share of the bytes at least: one bound is that of their number too.
        super().__init__(
            MOST_BYTES, getsizeof=lambda grammar: max(size(grammar), MOST_BYTES // MOST_GRAMMARS)
        )

    def __setitem__(self, key: tuple[str, str], grammar: Any) -> None:
        """Keep a grammar, unless it passes the bound by itself."""
        if len(key[1]) <= MOST_KEY_CHARACTERS and size(grammar) <= MOST_BYTES:
            super().__setitem__(key, grammar)


def size(grammar: Any) -> int:
    """Bytes of a compiled grammar; 0 where its backend does not tell."""
    inner = getattr(grammar, "grammar", None) or grammar
    compiled = getattr(inner, "ctx", None)
    return int(getattr(compiled, "memory_size_bytes", 0))


def _bound_cache(_result: None, backend: Any, *_args: Any, **_kwargs: Any) -> None:
    backend.cache = GrammarCache()


def _bound_compiler(_result: None, backend: Any, *_args: Any, **_kwargs: Any) -> None:
    from xgrammar import GrammarCompiler

    backend.grammar_compiler = GrammarCompiler(
        tokenizer_info=backend._tokenizer_info, cache_limit_bytes=MOST_BYTES
    )
