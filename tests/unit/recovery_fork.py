"""Processes that are forked to be killed, and what they told before."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "journal_faults.c"
Tell = Callable[[Mapping[str, Any]], None]


def compiled(folder: Path) -> Path | None:
    """The library that stands before the disk; None where there is no compiler for it."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def forked(work: Callable[[Tell], Awaitable[None]]) -> tuple[list[dict[str, Any]], int]:
    """Do some work in a process of its own, forked from this one, which must have one thread.

    Returns:
        What it told, the error that ended it at last, and its exit status, or minus its signal.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)

        def tell(what: Mapping[str, Any]) -> None:
            os.write(write, json.dumps(what).encode() + b"\n")

        status = 0
        try:
            asyncio.run(work(tell))
        except BaseException:
            tell({"error": traceback.format_exc()})
            status = 1
        os._exit(status)
    os.close(write)
    with open(read, "rb") as pipe:
        lines = pipe.read().splitlines(keepends=True)
    _, status = os.waitpid(child, 0)
    told = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return told, os.waitstatus_to_exitcode(status)


def forget(path: Path) -> None:
    """Remove a journal's files."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()
