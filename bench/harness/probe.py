"""Whether a server answers something small while it does something large."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness import http

_PAUSE_S = 0.002


@contextmanager
def answered(url: str, path: str) -> Iterator[list[float]]:
    """Ask for `path` again and again meanwhile; the seconds that each answer took.

    The list is filled as answers come, the last one behind the context's end.
    """
    took: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with http.client(url) as client:
            while not over.is_set():
                began = time.perf_counter()
                client.get(path).raise_for_status()
                took.append(time.perf_counter() - began)
                time.sleep(_PAUSE_S)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(20 * _PAUSE_S)  # so that it is connected and warm
    took.clear()
    try:
        yield took
    finally:
        over.set()
        asking.join()
