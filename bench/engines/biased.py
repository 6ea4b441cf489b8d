"""Our server with a verifier that is wrong on purpose: it often keeps a draft the model refuted.

Only a bench starts it, to see that its test of exactness would notice. Nothing in the package can
switch this on.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from stateful_sglang import launch
from stateful_sglang.server import processes

KEPT = 0.2
"""Share of refuted drafts that are emitted all the same."""

_run = processes.run_scheduler_process


def prefer_the_draft(sampled: int, drafted: int) -> int:
    """Emit the draft in place of the sample, every fifth time."""
    return drafted if random.random() < KEPT else sampled


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process with the verifier biased."""
    from stateful_sglang.runtime.speculation.worker import PromptLookupWorker

    PromptLookupWorker.emit = staticmethod(prefer_the_draft)
    _run(*args, **kwargs)


def main() -> int:
    """The launcher, for schedulers of ours."""
    from bench.engines import biased

    # By the module's name: a spawned scheduler imports it, and __main__ has another one there.
    processes.run_scheduler_process = biased.run_scheduler_process
    return launch.main()


if __name__ == "__main__":
    sys.exit(main())
