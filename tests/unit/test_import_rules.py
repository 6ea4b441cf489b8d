"""The pure rooms import neither SGLang nor torch: a session upgrade must not hurt there."""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = (
    "stateful_sglang.session.bounds",
    "stateful_sglang.grammar.constraints",
    "stateful_sglang.grammar.prepare",
    "stateful_sglang.service.engine",
    "stateful_sglang.session.ids",
    "stateful_sglang.session.rank",
    "stateful_sglang.rendering.delta",
    "stateful_sglang.session.store",
    "stateful_sglang.session.transcript",
    "stateful_sglang.prefix.paths",
    "stateful_sglang.prefix.pins",
    "stateful_sglang.prefix.policies.cardinal",
    "stateful_sglang.prefix.policies.lru",
    "stateful_sglang.prefix.queue",
    "stateful_sglang.draft.drafter",
    "stateful_sglang.draft.indexes",
    "stateful_sglang.draft.sources.suffix",
    "stateful_sglang.draft.width",
    "stateful_sglang.attachments.check",
    "stateful_sglang.runtime.config",
)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_neither_sglang_nor_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'sglang', 'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
