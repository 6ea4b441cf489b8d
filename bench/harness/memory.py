"""Memory of a server's processes, as the operating system counts it."""

from __future__ import annotations

from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

from bench.harness.server import Server


class Memory(NamedTuple):
    """What one process holds, in bytes."""

    rss: int
    """Resident, what it shares with others included."""
    pss: int | None
    """The same with what n processes share counted as an nth; None where it is not told."""


def of(server: Server) -> dict[str, Memory]:
    """Memory of each process of a server that holds 50 MB or more, by what it does."""
    root = psutil.Process(server.pid)
    found: dict[str, Memory] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            held, name = process.memory_full_info(), _name(process, root)
        except psutil.Error:
            continue
        if held.rss >= _SMALLEST:
            found[name] = Memory(held.rss, getattr(held, "pss", None))
    return found


_SMALLEST = 50 << 20


def _name(process: psutil.Process, root: psutil.Process) -> str:
    if process.pid == root.pid:
        return "api"
    title = " ".join(process.cmdline())
    for name in ("scheduler", "detokenizer"):
        if f"sglang::{name}" in title:
            return name
    return "compiler" if "grammar" in title else "other"
