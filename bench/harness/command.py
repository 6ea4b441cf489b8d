"""A bench as a program of its own: ``python -m bench.suites.NAME``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from bench.harness.server import end_with_us


def run(main: Callable[..., int | None]) -> None:
    """Run a bench's `main` with the command line's options, and exit with its status."""

    @functools.wraps(main)
    def exiting(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(main(*args, **kwargs) or 0)

    end_with_us()
    typer.run(exiting)
