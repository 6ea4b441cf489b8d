"""A turn computes its delta: computed tokens against delta tokens at growing histories.

One session for each history length is filled in one turn, then takes turns of new messages whose
tool results are real text. Every later turn must compute its delta and at most one page more (the
last sampled token's KV).

    python -m bench.suites.delta --json delta.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.harness.server import serve

HISTORIES = (500, 2000, 7000)
PAGE = 1
"""Tokens a page: SGLang's default on this device, and what speculation's chains need."""


def main() -> int:
    """Measure and print; exit status 1 where a turn computed more than its delta and a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5, help="after the first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    text = (Path(__file__).parents[1] / "harness/server.py").read_text()
    table = Table("history", "turn", "delta", "cached", "computed", "beyond delta", "TTFT, ms")
    worst = 0
    with serve() as server, httpx.Client(base_url=server.url, timeout=600) as client:
        for history in HISTORIES:
            session = client.post("/v1/sessions", json={}).raise_for_status().json()["id"]
            filler = [(7919 * i) % 40_000 + 100 for i in range(history - 8)]
            client.post(
                f"/v1/sessions/{session}/append",
                json={"input_ids": filler, "sampling": {"max_tokens": 8, "temperature": 0}},
            ).raise_for_status()
            for turn in range(1, args.turns + 1):
                excerpt = text[200 * turn : 200 * turn + 400]
                reply = client.post(
                    f"/v1/sessions/{session}/append",
                    json={
                        "messages": [{"role": "user", "content": excerpt}],
                        "sampling": {"max_tokens": 12, "temperature": 0},
                    },
                ).raise_for_status()
                usage = reply.json()["usage"]
                beyond = usage["computed_tokens"] - usage["delta_tokens"]
                worst = max(worst, beyond)
                table.add_row(
                    str(usage["history_tokens"]),
                    str(turn + 1),
                    str(usage["delta_tokens"]),
                    str(usage["cached_tokens"]),
                    str(usage["computed_tokens"]),
                    str(beyond),
                    f"{usage['ttft_ms']:.0f}",
                )
    Console().print(table)
    figures = {"computed_over_delta_max": worst, "page": PAGE}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps({"figures": figures}, indent=1))
    return 1 if worst > PAGE else 0


if __name__ == "__main__":
    raise SystemExit(main())
