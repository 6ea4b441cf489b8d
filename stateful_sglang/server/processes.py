"""Entry points of the processes that SGLang spawns: our platform first, then SGLang's own.

A spawned process imports the module of its target before anything else of ours or SGLang's, so
importing this module is what prepares it.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from stateful_sglang.cpu import platform
from stateful_sglang.server import lifetime, quiet

parent = multiprocessing.parent_process()
if parent is not None and parent.pid is not None:
    # SGLang's own processes ask for this too, but only behind ten seconds of imports.
    lifetime.end_with_parent(parent.pid)
quiet.install()
platform.prepare()


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's ``run_scheduler_process``: the process that computes, so it keeps every thread."""
    from sglang.srt.managers.scheduler import run_scheduler_process as run

    run(*args, **kwargs)


def run_detokenizer_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's ``run_detokenizer_process``, on one thread."""
    import torch
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as run

    torch.set_num_threads(1)
    run(*args, **kwargs)
