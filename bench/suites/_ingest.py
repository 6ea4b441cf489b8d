"""Part of the bench of sessions: results of tools that are computed while the others still run."""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.engines.operations import Operations
from bench.harness import http
from bench.harness.figures import Figure
from bench.harness.rounds import rotated, say
from bench.harness.server import serve
from bench.harness.stats import summarise
from bench.workloads.prompts import passage

Messages = list[dict[str, Any]]
_TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


def run(
    rounds: int, tokens: int, after_s: Sequence[float], more: list[str]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Time the first text of the answer to some results, from the arrival of the last one.

    Args:
        rounds: Of each way.
        tokens: Of each result, about.
        after_s: When the results arrive, in seconds from the calls.
        more: Arguments of the launcher.
    """
    ttft: dict[str, list[float]] = {name: [] for name in WAYS}
    computed: dict[str, list[int]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as place:
        journal = ("--journal", str(Path(place) / "journal.sqlite3"))
        with (
            serve("--keys", "off", *journal, *more) as server,
            http.client(server.url) as client,
        ):
            sessions = Operations(client)
            for number in range(-1, rounds):
                for name in rotated(list(WAYS), number):
                    took, left = _round(sessions, WAYS[name], number, tokens, after_s)
                    if number >= 0:  # the first is to warm up
                        ttft[name].append(took)
                        computed[name].append(left)
                say(f"results of tools: round {number + 1} of {rounds}")
    figures: dict[str, Figure] = {}
    for name in WAYS:
        times = summarise([1e3 * took for took in ttft[name]])
        figures[f"ingest_ttft_ms_{name}"] = round(times.median, 1)
        figures[f"ingest_ttft_ms_{name}_low"] = round(times.low, 1)
        figures[f"ingest_ttft_ms_{name}_high"] = round(times.high, 1)
        figures[f"ingest_left_tokens_{name}"] = statistics.median(computed[name])
    ratios = [a / b for a, b in zip(ttft["appended"], ttft["ingested"], strict=True)]
    figures["ingest_times_faster"] = round(statistics.median(ratios), 2)
    return figures, {"ttft_s": ttft}


def _ingested(sessions: Operations, session_id: str, results: Messages, at: list[float]) -> Any:
    """Each result as it comes, then the answer."""

    def take_in(result: dict[str, Any], when: float) -> None:
        _sleep_until(when)
        sessions.ingest(session_id, [result])

    running = [
        threading.Thread(target=take_in, args=each) for each in zip(results, at, strict=True)
    ]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return sessions.append(session_id, 1)


def _ingested_but_last(
    sessions: Operations, session_id: str, results: Messages, at: list[float]
) -> Any:
    """Each result but the last as it comes; the last one with the request for the answer."""
    for result, when in zip(results[:-1], at, strict=False):
        _sleep_until(when)
        sessions.ingest(session_id, [result])
    _sleep_until(at[-1])
    return sessions.append(session_id, 1, messages=results[-1:])


def _appended(sessions: Operations, session_id: str, results: Messages, at: list[float]) -> Any:
    """All results at once, when the last one is there."""
    _sleep_until(at[-1])
    return sessions.append(session_id, 1, messages=results)


WAYS: dict[str, Callable[[Operations, str, Messages, list[float]], Any]] = {
    "ingested": _ingested,
    "last_appended": _ingested_but_last,
    "appended": _appended,
}


def _round(
    sessions: Operations,
    way: Callable[[Operations, str, Messages, list[float]], Any],
    number: int,
    tokens: int,
    after_s: Sequence[float],
) -> tuple[float, int]:
    """Seconds from the last result's arrival to the first text, and tokens computed for it."""
    rng = random.Random()
    calls = [
        {"id": f"call-{at}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        for at in range(len(after_s))
    ]
    results = [
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "content": passage(rng.randrange(10**6), tokens),
        }
        for call in calls
    ]
    session_id = sessions.open(system="You read files.", tools=[_TOOL]).reply["id"]
    question = {"role": "user", "content": passage(rng.randrange(10**6), 100)}
    asked = [question, {"role": "assistant", "content": "I read them.", "tool_calls": calls}]
    sessions.ingest(session_id, asked)
    began = time.perf_counter()
    turn = way(sessions, session_id, results, [began + each for each in after_s])
    # The stream's first text: its request began so long before its end.
    first_text = time.perf_counter() - (turn.total_s - turn.ttft_s)
    sessions.close(session_id)
    return first_text - (began + max(after_s)), turn.computed


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))
