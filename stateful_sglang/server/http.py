"""SGLang's HTTP server in this process, with our routes on it."""

from __future__ import annotations

import os
from typing import Any

from stateful_sglang.runtime.options import Options
from stateful_sglang.server import ready


def serve(server_args: Any, options: Options) -> None:
    """Run SGLang's HTTP server in this process until it is told to stop."""
    import torch
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.utils.common import kill_process_tree

    from stateful_sglang.api import unserved
    from stateful_sglang.server import processes

    torch.set_num_threads(1)  # This process tokenises and serves HTTP; the scheduler computes.
    unserved.attach(app)
    extra = _stateful_client(app, options) if options.stateful else {}
    try:
        launch_server(
            server_args,
            run_scheduler_process_func=processes.run_scheduler_process,
            run_detokenizer_process_func=processes.run_detokenizer_process,
            launch_callback=lambda: ready.announce(server_args, options),
            **extra,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _stateful_client(app: Any, options: Options) -> dict[str, Any]:
    """The parts of `launch_server` that only a stateful server replaces."""
    from stateful_sglang.api import access_log
    from stateful_sglang.api.native.routes import build_router
    from stateful_sglang.runtime.sessions.engine import SGLangEngine, stateful_tokenizer_manager
    from stateful_sglang.service.service import Limits

    access_log.install()
    limits = Limits(content_tokens=options.content_tokens)

    return {
        "init_tokenizer_manager_func": stateful_tokenizer_manager(
            lambda manager: app.include_router(build_router(SGLangEngine(manager), limits))
        )
    }
