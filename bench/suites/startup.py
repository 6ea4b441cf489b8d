"""How long until a server is ready: cold, with nothing of ours cached, and warm.

Cold compiles the kernels and converts the embedded model into a new cache folder; the operating
system's file cache is as the round before left it. Rounds alternate.

    python -m bench.suites.startup [--rounds 3] [--json FILE] [any argument of the launcher]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

from bench.harness.server import serve
from bench.harness.stats import summarise

STAGES = {
    "compile": re.compile(r"CPU kernels compiled in (\d+(?:\.\d+)?) s"),
    "convert": re.compile(r"model ready in (\d+(?:\.\d+)?) s"),
    "pack": re.compile(r"packed(?: as int8)? in (\d+(?:\.\d+)?) s"),
}
"""What the server's log says of its start, by name."""


def start(cache: Path | None, arguments: list[str]) -> dict[str, float]:
    """Seconds of one start: ``ready`` in all, and its stages as far as the log tells."""
    more = [] if cache is None else ["--cache-dir", str(cache)]
    with serve(*arguments, *more) as server:
        log = server.log.read_text(errors="replace")
        seconds = {"ready": server.start_s}
    for name, pattern in STAGES.items():
        if found := pattern.search(log):
            seconds[name] = float(found[1])
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args, arguments = parser.parse_known_args()
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs["cold"].append(start(Path(folder), arguments))
        runs["warm"].append(start(None, arguments))
        for kind, done in runs.items():
            told = ", ".join(f"{name} {value:.1f} s" for name, value in done[-1].items())
            print(f"round {number + 1}/{args.rounds}: {kind}: {told}", flush=True)
    for kind, done in runs.items():
        ready = summarise([one["ready"] for one in done])
        print(f"{kind}: ready in {ready.median:.1f} s ({ready.low:.1f} to {ready.high:.1f})")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
