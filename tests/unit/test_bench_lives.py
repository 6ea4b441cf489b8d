"""The bench of recovery outlasts a machine that is full for a while, and no longer than that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.harness import lives
from bench.harness.server import Server, ServerDiedError


def failing(times: int) -> Any:
    left = [times]

    @contextlib.contextmanager
    def serve(*_: str, **__: Any) -> Iterator[Server]:
        left[0] -= 1
        if left[0] >= 0:
            raise ServerDiedError("too little memory")
        yield Server("http://127.0.0.1:1", 1, Path("log"), 3.0)

    return serve


def test_a_start_that_failed_is_tried_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives, "serve", failing(2))
    with lives.Lives(Path("journal.sqlite3"), pause_s=0) as server:
        assert server.start() == 3.0
        assert server.failed_starts == ["too little memory"] * 2


def test_a_server_that_never_starts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives, "serve", failing(100))
    with (
        lives.Lives(Path("journal.sqlite3"), pause_s=0) as server,
        pytest.raises(ServerDiedError, match="too little memory"),
    ):
        server.start()
