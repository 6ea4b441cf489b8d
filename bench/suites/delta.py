"""A turn computes its delta: computed tokens against delta tokens at growing histories.

One session for each history length is filled in one turn, then takes turns of new messages whose
contents are real text. Every later turn must compute its delta and at most one page more (the last
sampled token's KV).

    python -m bench delta --json delta.json
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import corpus
from bench.harness import http
from bench.harness.figures import report
from bench.harness.options import Json, ServerArguments
from bench.harness.server import serve

HISTORIES = (500, 2000, 7000)
PAGE = 1
"""Tokens a page: SGLang's default on this device, and what speculation's chains need."""


def main(
    turns: Annotated[int, typer.Option(min=1, max=40, help="After the first.")] = 5,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Measure and print; exit status 1 where a turn computed more than its delta and a page."""
    table = Table("history", "turn", "delta", "cached", "computed", "beyond delta", "TTFT, ms")
    worst = 0
    with serve(*server_arguments or ()) as server, http.client(server.url) as client:
        for history in HISTORIES:
            session = client.post("/v1/sessions", json={}).raise_for_status().json()["id"]
            filler = [(7919 * i) % 40_000 + 100 for i in range(history - 8)]
            client.post(
                f"/v1/sessions/{session}/append",
                json={"input_ids": filler, "sampling": {"max_tokens": 8, "temperature": 0}},
            ).raise_for_status()
            for turn, excerpt in enumerate(corpus.excerpts(turns), 2):
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
                    str(turn),
                    str(usage["delta_tokens"]),
                    str(usage["cached_tokens"]),
                    str(usage["computed_tokens"]),
                    str(beyond),
                    f"{usage['ttft_ms']:.0f}",
                )
    Console().print(table)
    report({"computed_over_delta_max": worst, "page": PAGE}, json)
    return 1 if worst > PAGE else 0
