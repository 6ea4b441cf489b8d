"""Rounds in which every arm has its turn: none is always the first, and nobody else measures."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def rotated(arms: Sequence[T], number: int) -> list[T]:
    """The order of a round: each round another arm begins."""
    turn = number % len(arms) if arms else 0
    return [*arms[turn:], *arms[:turn]]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the lock that keeps benches on this machine from measuring each other."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Tell how far a bench is, beside its results: on standard error."""
    Console(stderr=True, highlight=False).print(text, markup=False)


class Left:
    """Says how long what is left takes, if it takes what has been done took; from any thread."""

    def __init__(self, of: int) -> None:
        self._of = of
        self._done = itertools.count(1)
        self._began = time.monotonic()

    def one_more(self) -> str:
        """Once one more is done."""
        done = next(self._done)
        seconds = (time.monotonic() - self._began) / done * max(0, self._of - done)
        return f"{done}/{self._of}, about {seconds / 60:.1f} min left"


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield items under a bar that vanishes; where no terminal reads it, a line at each tenth."""
    if sys.stderr.isatty():
        yield from track(items, what, console=Console(stderr=True), transient=True)
        return
    for number, item in enumerate(items, 1):
        yield item
        if number * 10 // len(items) > (number - 1) * 10 // len(items):
            print(f"{what}: {number}/{len(items)}", file=sys.stderr, flush=True)
