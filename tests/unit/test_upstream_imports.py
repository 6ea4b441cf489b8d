"""Whatever we import of SGLang is an attachment, or is listed here with the reason why not."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from stateful_sglang.attachments.check import TABLE
from stateful_sglang.attachments.sources import installed

PACKAGE = Path(__file__).parents[2] / "stateful_sglang"
NO_ROW = {
    "sglang.srt.mem_cache.unified_cache.cache_action.CacheAction": "an annotation",
    "sglang.srt.mem_cache.unified_cache.cache_action.ComponentAction": "an annotation",
    "sglang.srt.mem_cache.unified_cache.components.base.EvictLayer": "an annotation",
    "sglang.srt.managers.schedule_batch.ScheduleBatch": "an annotation; its use is tested",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": "likewise",
    "sglang.srt.layers.radix_attention.AttentionType": "an enumeration: a lost member is an error",
    "sglang.srt.mem_cache.kv_loc_plan.IdSpaceKind": "likewise",
    "sglang.srt.mem_cache.unified_cache.component_type.ComponentType": "likewise",
    "sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode": "likewise",
    "sglang.srt.model_executor.forward_batch_info.ForwardMode": "likewise",
    "sglang.srt.plugins.hook_registry.HookType": "likewise",
    "sglang.srt.speculative.spec_info.SpecInputType": "likewise",
    "sglang.srt.mem_cache.unified_cache.component_type.BASE_COMPONENT_TYPE": "a constant",
    "sglang.srt.model_executor.runner.eager_runner.EagerRunner": "asked for by isinstance only",
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding": "the row of what it computes is",
}


def imported() -> dict[str, set[str]]:
    """Every name imported of SGLang anywhere in the package, and the files that import it."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.split(".")[0] == "sglang":
                    found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    return found


def definitions() -> dict[str, set[str]]:
    """The same by where each name is defined: packages hand names on."""
    found: dict[str, set[str]] = {}
    for name, files in imported().items():
        found.setdefault(installed().definition(name), set()).update(files)
    return found


def test_every_import_of_sglang_has_a_row_or_a_reason_why_not() -> None:
    rows = {row["target"] for row in json.loads(TABLE.read_text(encoding="utf-8"))}

    def has_row(name: str) -> bool:
        return any(
            f"{row}.".startswith(f"{name}.") or f"{name}.".startswith(f"{row}.") for row in rows
        )

    missing = {
        name: sorted(files)
        for name, files in definitions().items()
        if not has_row(name) and name not in NO_ROW
    }
    assert missing == {}


def test_nothing_is_excused_that_has_a_row_or_is_not_imported() -> None:
    assert set(NO_ROW) <= set(definitions())
