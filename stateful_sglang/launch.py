"""Start SGLang's HTTP server with our plugin attached: ``python -m stateful_sglang.launch``.

Our own arguments are taken out, every other one goes to SGLang unchanged; settings that suit this
machine are added where the user gave none. Spawned processes import this module again, so nothing
heavy happens at import.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from stateful_sglang import loopback
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import arguments, http, parser, preflight, quiet, supervisor
from stateful_sglang.server.errors import EXIT_UNUSABLE, LaunchError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Returns the exit status: 2 where the server could not be started."""
    loopback.spare(os.environ)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options, theirs = parser.parse(words)
        if options.restart == "on-crash":
            supervisor.check()
            # The last one counts: the child is an ordinary server.
            child = [sys.executable, "-m", "stateful_sglang.launch", *words, "--restart", "never"]
            return supervisor.run(child)
        server_args, options = configure(options, theirs)
    except LaunchError as error:
        print(f"stateful_sglang: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    return http.serve(server_args, options)


def configure(options: Options, theirs: list[str]) -> tuple[Any, Options]:
    """Settle every setting, publish ours to the processes to come, and return SGLang's.

    Raises:
        LaunchError: The machine, the model or an argument will not do.
    """
    given = preflight.check(options, theirs)
    return arguments.settle(dataclasses.replace(options, quiet=quiet.wanted(given)), theirs)


if __name__ == "__main__":
    sys.exit(main())
