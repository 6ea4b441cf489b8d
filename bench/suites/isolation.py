"""Can one tenant tell from the clock what another has sent: time to the first token of a prompt.

A server with two tenants. Each round has three new prompts of one length, in random order: one that
nobody has sent (cold), one that the other tenant has just sent (foreign), and one that the same
tenant has just sent (own). Before the cold one the other tenant sends something else, so that all
three come after the same work. Differences are paired by round. What is told: the mean difference
of foreign and cold with its 95 % interval, the smallest one that these rounds find with 80 % power
(both by Student's t), and the difference of own and cold, which is what sharing would show.

    python -m bench isolation --rounds 200 --json isolation.json
"""

from __future__ import annotations

import json as jsonlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.harness import http
from bench.harness.figures import report
from bench.harness.options import Json, Rounds, Seed, ServerArguments
from bench.harness.server import serve
from bench.workloads.prompts import random_ids

VOCABULARY = 49_152
"""Of the embedded model."""
ARMS = ("cold", "foreign", "own")
CONFIDENCE, POWER = 0.95, 0.8


def key(file: Path, tenant: str) -> str:
    """A new key of a tenant, as a person makes it."""
    command = [sys.executable, "-m", "stateful_sglang.cli", "keys", "add", "--tenant", tenant]
    made = subprocess.run(
        [*command, "--keys", str(file), "--json"], check=True, capture_output=True, text=True
    )
    return str(jsonlib.loads(made.stdout)["key"])


def first_token_ms(client: httpx.Client, ids: list[int]) -> tuple[float, int]:
    """Milliseconds to an answer of one token, and the prompt's tokens whose KV was found."""
    sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"draft": "off"}}
    began = time.perf_counter()
    reply = client.post("/generate", json={"input_ids": ids, "sampling_params": sampling})
    took = 1e3 * (time.perf_counter() - began)
    reply.raise_for_status()
    return took, int(reply.json()["meta_info"]["cached_tokens"])


def measure(
    asking: httpx.Client, other: httpx.Client, rng: random.Random, length: int
) -> dict[str, tuple[float, int]]:
    """One round."""
    measured = {}
    for arm in rng.sample(ARMS, len(ARMS)):
        prompt = random_ids(rng, length, VOCABULARY)
        before = prompt if arm != "cold" else random_ids(rng, length, VOCABULARY)
        first_token_ms(asking if arm == "own" else other, before)
        measured[arm] = first_token_ms(asking, prompt)
    return measured


def difference(pairs: list[float]) -> dict[str, float]:
    """Mean of paired differences, its interval, and the smallest one that would be found."""
    from scipy.stats import t as student  # type: ignore[import-untyped]

    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    surely = student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)
    mean = statistics.mean(pairs)
    return {
        "ms": mean,
        "low_ms": mean - surely * error,
        "high_ms": mean + surely * error,
        "p": 2 * float(student.sf(abs(mean) / error, len(pairs) - 1)),
        "found_ms": (surely + student.ppf(POWER, len(pairs) - 1)) * error,
    }


def main(
    rounds: Rounds = 200,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a prompt.")] = 1000,
    seed: Seed = None,
    json: Json = None,
    arguments: ServerArguments = None,
) -> None:
    """Measure and print; see the module's docstring."""
    rounds = max(rounds or 200, 3)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        keys = [key(file, tenant) for tenant in ("asking", "other")]
        with (
            serve(*(arguments or ()), "--keys", str(file)) as server,
            http.client(server.url, timeout_s=120) as asking,
            http.client(server.url, timeout_s=120) as other,
        ):
            for client, secret in zip((asking, other), keys, strict=True):
                client.headers["authorization"] = f"Bearer {secret}"
            for _ in range(3):  # warm up
                measure(asking, other, rng, length)
            measured = [measure(asking, other, rng, length) for _ in range(rounds)]
    times = {arm: [each[arm][0] for each in measured] for arm in ARMS}
    cached = {arm: sum(each[arm][1] for each in measured) for arm in ARMS}
    table = Table("prompt", "median, ms", "tokens found")
    for arm in ARMS:
        table.add_row(arm, f"{statistics.median(times[arm]):.1f}", str(cached[arm]))
    Console().print(table)
    figures: dict[str, float] = {"rounds": rounds, "cached_foreign": cached["foreign"]}
    for arm in ("foreign", "own"):
        pairs = [one - cold for one, cold in zip(times[arm], times["cold"], strict=True)]
        figures |= {f"{arm}_{name}": value for name, value in difference(pairs).items()}
    report(figures, json, times_ms=times)
