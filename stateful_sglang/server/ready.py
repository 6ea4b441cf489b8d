"""The line that says a server answers, with a command to try."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from stateful_sglang import loopback
from stateful_sglang.runtime.options import Options

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 60.0
_ANSWER_POLL_S = 0.05


def announce(server_args: Any, options: Options, *, key: bool) -> None:
    """Say that the server answers. SGLang calls this once its own warm-up is through.

    Args:
        server_args: SGLang's.
        options: Ours.
        key: Whether it asks for an API key.
    """
    url = server_args.url()
    if not _answers(url):
        return  # SGLang has said what was wrong, or is being stopped
    told = text(
        url,
        seconds=time.time() - _process_start(),
        stateful=options.stateful,
        key=key,
        past_proxy=loopback.has_proxy(os.environ),
    )
    if options.quiet:
        print(told, file=sys.stderr, flush=True)
    else:
        logger.info("%s", told)


def text(url: str, *, seconds: float, stateful: bool, key: bool, past_proxy: bool) -> str:
    """What a person reads.

    Args:
        url: Where the server answers.
        seconds: From the start of the process.
        stateful: Whether it has sessions.
        key: Whether it asks for an API key.
        past_proxy: The commands have to keep curl off the environment's proxy.
    """
    curl = "curl -s"
    if past_proxy:
        curl += " --noproxy '*'"
    if url.startswith("https:"):
        curl += " -k"
    if key:
        curl += ' -H "Authorization: Bearer $API_KEY"'
    message = '"messages": [{"role": "user", "content": "Name three colours."}]'
    if stateful:
        session_id = r"""sed 's/.*"id": *"\([^"]*\)".*/\1/'"""
        commands = [
            f"session=$({curl} {url}/v1/sessions -d '{{}}' | {session_id})",
            f"{curl} {url}/v1/sessions/$session/append \\",
            f"""    -d '{{{message}, "sampling": {{"max_tokens": 40}}}}'""",
        ]
    else:
        commands = [
            f"{curl} {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"""    -d '{{"model": "default", "max_tokens": 40, {message}}}'""",
        ]
    listed = "\n".join(f"  {command}" for command in commands)
    what = "The next turn of that session sends only what is new" if stateful else "Plain SGLang"
    return f"Ready after {seconds:.0f} s: {url}\n{listed}\n{what}; Ctrl-C stops the server."


def _answers(url: str) -> bool:
    """Wait until the server answers anything at all; without a warm-up nobody has asked it yet."""
    import httpx

    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    with httpx.Client(mounts=loopback.direct(url), verify=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                client.get(f"{url}/model_info")
            except httpx.TransportError:
                time.sleep(_ANSWER_POLL_S)
            else:
                return True
    return False


def _process_start() -> float:
    import psutil

    return float(psutil.Process().create_time())
