"""Start SGLang's HTTP server with our plugin attached: ``python -m stateful_sglang.launch``.

Our own arguments are taken out, every other one goes to SGLang unchanged; settings that suit this
machine are added where the user gave none. Spawned processes import this module again, so nothing
heavy happens at import.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from stateful_sglang import loopback
from stateful_sglang.draft import sources
from stateful_sglang.prefix.policies import POLICIES
from stateful_sglang.runtime.config import PluginConfig
from stateful_sglang.server import arguments, preflight, quiet, ready
from stateful_sglang.server.arguments import DEFAULT_HOST, DEFAULT_PORT, LaunchError

logger = logging.getLogger(__name__)

EXIT_UNUSABLE = 2
"""Exit status when the server was not started because something the user can mend is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}. See python -m stateful_sglang.launch --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Returns the exit status: 2 where the server could not be started."""
    loopback.spare(os.environ)
    try:
        ours, theirs = parse(sys.argv[1:] if argv is None else list(argv))
        server_args, config = configure(ours, theirs)
    except LaunchError as error:
        print(f"stateful_sglang: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    serve(server_args, config)
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into ours and SGLang's.

    Raises:
        LaunchError: A value of ours is out of range.
    """
    parser = _Parser(
        prog="python -m stateful_sglang.launch",
        allow_abbrev=False,
        description="Start SGLang's server with sessions that live on the server.",
        epilog="Every other argument is SGLang's: see python -m sglang.launch_server --help. "
        f"The server listens on {DEFAULT_HOST}:{DEFAULT_PORT} unless told otherwise.",
    )
    defaults = PluginConfig()
    parser.add_argument(
        "--stateful",
        choices=["on", "off"],
        default="on",
        help="off: plain SGLang, with the same CPU support (default: on)",
    )
    parser.add_argument(
        "--pin-budget",
        type=float,
        default=defaults.pin_budget,
        metavar="SHARE",
        help="largest share of the KV pool, 0 to 1, that sessions pin (default: %(default)s)",
    )
    parser.add_argument(
        "--eviction-policy",
        choices=list(POLICIES),
        default=defaults.eviction_policy,
        help=f"what leaves the KV pool first. {POLICIES.summaries()} (default: %(default)s)",
    )
    parser.add_argument(
        "--draft",
        choices=sources.CHOICES,
        default=defaults.draft,
        help=f"where drafts come from. {sources.SOURCES.summaries()}; off: no drafts "
        f"(default: %(default)s, which is {sources.DEFAULT})",
    )
    parser.add_argument(
        "--max-draft",
        type=int,
        default=defaults.max_draft,
        metavar="TOKENS",
        help="most tokens drafted for a request in one step (default: %(default)s)",
    )
    parser.add_argument(
        "--content-tokens",
        choices=["text", "special"],
        default=defaults.content_tokens,
        help="what a special token that is spelled in a message or a tool's result becomes: text, "
        "or that token, so that whoever wrote it can open and close turns (default: %(default)s)",
    )
    parser.add_argument(
        "--cpu-quant",
        choices=["off", "int8"],
        default=defaults.cpu_quant,
        help="without a GPU: round weights to int8, half the memory to read and no longer exact "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where converted models and compiled kernels are kept",
    )
    ours, theirs = parser.parse_known_args(argv)
    if not 0.0 <= ours.pin_budget <= 1.0:
        raise LaunchError(
            f"--pin-budget is {ours.pin_budget}; it is a share of the KV pool between 0 and 1, "
            f"for example --pin-budget {defaults.pin_budget}"
        )
    if not 1 <= ours.max_draft <= 64:
        raise LaunchError(
            f"--max-draft is {ours.max_draft}; expected 1 to 64 tokens. To draft nothing, use "
            "--draft off"
        )
    return ours, theirs


def configure(ours: argparse.Namespace, theirs: list[str]) -> tuple[Any, PluginConfig]:
    """Settle every setting, publish ours to the processes to come, and return SGLang's.

    Raises:
        LaunchError: The machine, the model or an argument will not do.
    """
    config = settings(ours)
    given = preflight.check(config, theirs)
    config = dataclasses.replace(config, quiet=quiet.wanted(given))
    return arguments.settle(ours, config, theirs)


def settings(ours: argparse.Namespace) -> PluginConfig:
    """The plugin's settings from our part of the command line."""
    return PluginConfig(
        stateful=ours.stateful == "on",
        pin_budget=ours.pin_budget,
        eviction_policy=ours.eviction_policy,
        draft=ours.draft,
        max_draft=ours.max_draft,
        content_tokens=ours.content_tokens,
        cpu_quant=ours.cpu_quant,
    )


def serve(server_args: Any, config: PluginConfig) -> None:
    """Run SGLang's HTTP server in this process until it is told to stop."""
    import torch
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.utils import kill_process_tree

    from stateful_sglang.api import unserved
    from stateful_sglang.server import processes

    torch.set_num_threads(1)  # This process tokenises and serves HTTP; the scheduler computes.
    unserved.attach(app)
    extra = _stateful_client(config) if config.stateful else {}
    try:
        launch_server(
            server_args,
            run_scheduler_process_func=processes.run_scheduler_process,
            run_detokenizer_process_func=processes.run_detokenizer_process,
            launch_callback=lambda: ready.announce(server_args, config),
            **extra,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _stateful_client(config: PluginConfig) -> dict[str, Any]:
    """The parts of `launch_server` that only a stateful server replaces."""
    from sglang.srt.entrypoints.http_server import app

    from stateful_sglang.api import access_log
    from stateful_sglang.api.native.routes import build_router
    from stateful_sglang.runtime.sessions.engine import SGLangEngine, stateful_tokenizer_manager
    from stateful_sglang.service.service import Limits

    access_log.install()
    limits = Limits(content_tokens=config.content_tokens)

    return {
        "init_tokenizer_manager_func": stateful_tokenizer_manager(
            lambda manager: app.include_router(build_router(SGLangEngine(manager), limits))
        )
    }


if __name__ == "__main__":
    sys.exit(main())
