"""Where the server listens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stateful_sglang import loopback
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


def require_keys(given: Mapping[str, Any], *, keyed: bool) -> None:
    """Refuse to listen beyond this machine for callers that need no key.

    Args:
        given: SGLang's arguments; its own ``--api-key`` is a key too.
        keyed: There is a file of keys.

    Raises:
        LaunchError: The host among these arguments can be reached by others.
    """
    host = given.get("host", DEFAULT_HOST)
    if keyed or given.get("api_key") or loopback.is_loopback(str(host).strip("[]")):
        return
    raise LaunchError(
        f"--host {host} lets other machines in, and no keys exist, so that whoever reaches this "
        "one could read every session. Make keys with stateful-sglang keys add --tenant NAME, or "
        "leave --host out, or add --insecure where everybody who can reach it may use it"
    )
