"""SGLang's plugin entry point: runs in every server process before it parses its arguments.

SGLang logs a plugin's failure and goes on without it. A server that silently lost its sessions
would be worse than none, so every failure here ends the process.
"""

from __future__ import annotations

import logging
import traceback

from stateful_sglang.runtime.options import Options

logger = logging.getLogger(__name__)


def activate() -> None:
    """Attach to SGLang as the launcher's settings say; nothing happens where we did not launch."""
    try:
        options = Options.from_env()
        if options is not None:
            _attach(options)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(f"stateful_sglang could not attach to SGLang: {error}") from error


def _attach(options: Options) -> None:
    from stateful_sglang import cpu
    from stateful_sglang.attachments import check as attachments

    attachments.require_match()
    cpu.attach(int8=options.cpu_quant == "int8")
    from stateful_sglang.runtime import admission, grammar_cache, isolation

    admission.attach()
    grammar_cache.attach()
    isolation.attach()
    if not options.stateful:
        return
    from stateful_sglang.runtime import grammar_compile, min_tokens, stops
    from stateful_sglang.runtime.sessions import scheduler
    from stateful_sglang.runtime.speculation import algorithm as draft_spec
    from stateful_sglang.runtime.tree import cache as tree

    tree.register(options.pin_budget, options.eviction_policy, options.publish_budget)
    if options.draft != "off":
        draft_spec.register()
    scheduler.attach()
    min_tokens.attach()
    stops.attach()
    grammar_compile.attach()
