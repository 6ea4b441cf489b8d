"""Zero when unused: plain requests with our extension on and with ``--stateful off``.

Two servers of the same build, never at once, in alternating rounds: each round starts both arms
in turn and sends the same new prompts to each (random tokens, so that no cache can have seen
them). The ratio of an arm's medians is taken a round, and the rounds' median is what is reported.

    python -m bench.suites.overhead --rounds 5 --json overhead.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.harness.server import serve

LENGTHS = (64, 500, 2000, 4000)
ARMS = {"off": ("--stateful", "off"), "on": ("--stateful", "on")}


def prompts(rng: random.Random, count: int) -> dict[int, list[list[int]]]:
    """New prompts of each length, as token ids of the embedded model's vocabulary."""
    return {
        length: [[rng.randrange(20, 49_000) for _ in range(length)] for _ in range(count)]
        for length in LENGTHS
    }


def measure(
    client: httpx.Client, work: dict[int, list[list[int]]], max_tokens: int, draft: str
) -> dict[int, list[float]]:
    """Milliseconds of each request, by prompt length."""
    times: dict[int, list[float]] = {length: [] for length in work}
    sampling = {
        "temperature": 0,
        "max_new_tokens": max_tokens,
        "ignore_eos": True,
        "custom_params": {"draft": draft},
    }
    for length, batch in work.items():
        for ids in batch:
            began = time.perf_counter()
            reply = client.post("/generate", json={"input_ids": ids, "sampling_params": sampling})
            reply.raise_for_status()
            times[length].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=5, help="a length, a round and an arm")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None, help="default: new prompts every run")
    parser.add_argument(
        "--draft", choices=("off", "auto"), default="off", help="for these requests"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    console = Console()
    rng = random.Random(args.seed)
    medians: dict[str, dict[int, list[float]]] = {
        arm: {length: [] for length in LENGTHS} for arm in ARMS
    }
    for number in range(args.rounds):
        work = prompts(rng, args.requests)
        order = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
        for arm in order:
            with (
                serve(*ARMS[arm]) as server,
                httpx.Client(base_url=server.url, timeout=300) as http,
            ):
                measure(http, prompts(rng, 1), args.max_tokens, args.draft)  # warm up
                times = measure(http, work, args.max_tokens, args.draft)
            for length in LENGTHS:
                medians[arm][length].append(statistics.median(times[length]))
            console.print(f"round {number + 1}/{args.rounds}: {arm} done", highlight=False)

    table = Table("prompt tokens", "off, ms", "on, ms", "on / off", "rounds")
    ratios: dict[int, float] = {}
    for length in LENGTHS:
        off, on = medians["off"][length], medians["on"][length]
        pairs = [b / a for a, b in zip(off, on, strict=True)]
        ratios[length] = statistics.median(pairs)
        table.add_row(
            str(length),
            f"{statistics.median(off):.1f}",
            f"{statistics.median(on):.1f}",
            f"{ratios[length]:.3f}",
            f"{min(pairs):.3f} to {max(pairs):.3f}",
        )
    console.print(table)
    figures = {f"overhead_{length}": round(ratio, 4) for length, ratio in ratios.items()}
    figures["overhead_median"] = round(statistics.median(ratios.values()), 4)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps({"figures": figures, "medians_ms": medians}, indent=1))


if __name__ == "__main__":
    main()
