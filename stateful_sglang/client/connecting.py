"""What all commands that talk to a running server share: where it is, and how errors are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import httpx
import typer

from stateful_sglang.client.errors import ApiError
from stateful_sglang.client.sync import Client

API_KEY_ENV = "STATEFUL_SGLANG_API_KEY"

Url = Annotated[str, typer.Option("--url", help="The server.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=API_KEY_ENV,
        show_default=False,
        help="Where the server asks for one. Better in the environment: arguments can be seen.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]

ANY_ID = {"ignore_unknown_options": True}
"""Of commands that take an id, which may begin with a dash."""


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client whose errors are a line and an exit status."""
    try:
        with Client(url, api_key=api_key, max_retries=0) as client:
            yield client
    except ApiError as error:
        raise failed(str(error)) from error
    except httpx.TransportError as error:
        raise failed(f"{url} does not answer: {error}; is the server running?") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise failed(f"--url {url} can't be used: {error}") from error


def failed(message: str) -> typer.Exit:
    """What to raise so that the command ends with a line and exit status 1."""
    print(f"stateful-sglang: {message}", file=sys.stderr)
    return typer.Exit(1)
