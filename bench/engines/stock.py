"""SGLang as it is, but for the stand-in ops without which it does not start on this CPU.

Takes SGLang's arguments. Nothing of ours is attached: its own attention, its own layers.

    python -m bench.engines.stock --model-path M --device cpu --attention-backend torch_native
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Serve until stopped."""
    from stateful_sglang.runtime.options import ENV
    from stateful_sglang.server import processes  # Importing it prepares this process for SGLang.

    os.environ.pop(ENV, None)  # Our plugin stays idle without its settings.
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(sys.argv[1:])
    server_args.resolve_once()
    try:
        launch_server(
            server_args,
            run_scheduler_process_func=processes.run_scheduler_process,
            run_detokenizer_process_func=processes.run_detokenizer_process,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
