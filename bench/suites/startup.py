"""How long until a server is ready: cold, with nothing of ours cached, and warm.

Cold compiles the kernels and converts the embedded model into a new cache folder; the operating
system's file cache is as the round before left it. Rounds alternate.

    python -m bench startup --rounds 3 --json startup.json
"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Sequence

from bench.harness.figures import report
from bench.harness.options import Json, Rounds, ServerArguments
from bench.harness.rounds import say
from bench.harness.server import serve

KINDS = ("cold", "warm")
STAGES = {
    "compile": re.compile(r"CPU kernels compiled in (\d+(?:\.\d+)?) s"),
    "convert": re.compile(r"model ready in (\d+(?:\.\d+)?) s"),
    "pack": re.compile(r"packed(?: as int8)? in (\d+(?:\.\d+)?) s"),
}
"""What the server's log says of its start, by name."""


def start(kind: str, arguments: Sequence[str]) -> dict[str, float]:
    """Seconds of one start: ``ready`` in all, and its stages as far as the log tells."""
    with tempfile.TemporaryDirectory() as folder:
        more = ["--cache-dir", folder] if kind == "cold" else []
        with serve(*arguments, *more) as server:
            log = server.log.read_text(errors="replace")
            seconds = {"ready": server.start_s}
    for name, pattern in STAGES.items():
        if found := pattern.search(log):
            seconds[name] = float(found[1])
    return seconds


def main(rounds: Rounds = 3, json: Json = None, server_arguments: ServerArguments = None) -> None:
    """Measure and print."""
    rounds = rounds or 3
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS:
            runs[kind].append(start(kind, server_arguments or ()))
            told = ", ".join(f"{name} {value:.1f} s" for name, value in runs[kind][-1].items())
            say(f"round {number + 1}/{rounds}: {kind}: {told}")
    figures = {
        f"{kind}_{stage}_s": round(statistics.median(times), 1)
        for kind, done in runs.items()
        for stage in ("ready", *STAGES)
        if (times := [one[stage] for one in done if stage in one])
    }
    report(figures, json, **runs)
