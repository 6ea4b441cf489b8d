"""Where the server listens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stateful_sglang.server import machine
from stateful_sglang.server.errors import LaunchError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 30000


def default(given: Mapping[str, Any]) -> dict[str, str]:
    """The host where the user named none: this machine only."""
    return {} if "host" in given else {"host": DEFAULT_HOST}


def check(given: Mapping[str, Any]) -> None:
    """Look whether the server could listen at the host and port among these arguments.

    Raises:
        LaunchError: It could not.
    """
    host, port = given.get("host", DEFAULT_HOST), given.get("port", DEFAULT_PORT)
    problem = machine.port_problem(host, port)
    if problem is not None:
        raise LaunchError(
            f"cannot listen on {host}:{port}: {problem}. Stop what is using the port, or choose "
            "another with --port"
        )
