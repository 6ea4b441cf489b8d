"""SGLang's plugin entry point: runs in every server process before it parses its arguments.

SGLang logs a plugin's failure and goes on without it. A server that silently lost its sessions
would be worse than none, so every failure here ends the process.
"""

from __future__ import annotations

import logging
import traceback

from stateful_sglang.runtime.config import PluginConfig

logger = logging.getLogger(__name__)


def activate() -> None:
    """Attach to SGLang as the launcher's settings say; nothing happens where we did not launch."""
    config = PluginConfig.from_env()
    if config is None:
        return
    try:
        _attach(config)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(f"stateful_sglang could not attach to SGLang: {error}") from error


def _attach(config: PluginConfig) -> None:
    from stateful_sglang import cpu
    from stateful_sglang.attachments import check as attachments

    attachments.require_match()
    cpu.attach(int8=config.cpu_quant == "int8")
    from stateful_sglang.runtime import admission

    admission.attach()
    if not config.stateful:
        return
    from stateful_sglang.runtime import min_tokens
    from stateful_sglang.runtime.sessions import scheduler
    from stateful_sglang.runtime.speculation import algorithm as draft_spec
    from stateful_sglang.runtime.tree import cache as tree

    tree.register(config.pin_budget, config.eviction_policy)
    if config.draft != "off":
        draft_spec.register()
    scheduler.attach()
    min_tokens.attach()
