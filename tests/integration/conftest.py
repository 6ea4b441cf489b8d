"""One real server for all tests that only need a server."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

import pytest

from bench.harness.server import Server, serve

ARGUMENTS_ENV = "STATEFUL_SGLANG_TEST_SERVER_ARGS"
"""Arguments of the server under test, as on a command line."""
DEFAULT_ARGUMENTS = "--dtype float32 --context-length 4096 --log-level-http info"
"""In float32 the same prompt gives the same greedy answer, however it was cut into turns. The
access log is on, so that a test can look for secrets in it."""

BEHIND_A_PROXY = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
"""As on most company machines, but with a proxy that answers nobody: all that goes there fails."""


@pytest.fixture(scope="session")
def server_arguments() -> list[str]:
    """What the server under test is started with."""
    return shlex.split(os.environ.get(ARGUMENTS_ENV, DEFAULT_ARGUMENTS))


@pytest.fixture(scope="session")
def server(server_arguments: list[str]) -> Iterator[Server]:
    """A server of the default model on a free port, ended by its own process id."""
    with serve(*server_arguments, env=BEHIND_A_PROXY) as running:
        yield running
