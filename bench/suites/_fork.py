"""Part of the bench of sessions: forks and rollbacks of a long one."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from bench.engines import random_model
from bench.engines.operations import Operations, Turn
from bench.harness import http, memory
from bench.harness.figures import Figure
from bench.harness.rounds import say
from bench.harness.server import Server, serve
from bench.harness.spread import milliseconds
from bench.workloads.prompts import random_ids

_DELTA = 16
_PIECES = 20
"""Appends that the long session is made of, so that it has versions to go back to."""


def run(tokens: int, times: int, more: list[str]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Fork a session of that many tokens so many times, and roll it back as often.

    Returns:
        Figures, and what they come from.
    """
    room = tokens + 4 * times * (_DELTA + 4) + 4096
    with tempfile.TemporaryDirectory() as place:
        model = random_model.save(Path(place) / "model", room)
        journal = Path(place) / "journal.sqlite3"
        arguments = random_model.arguments(model, room, room)
        with (
            serve(*arguments, "--journal", str(journal), *more) as server,
            http.client(server.url) as client,
        ):
            return _measure(server, Operations(client), client, tokens, times)


def _measure(
    server: Server, sessions: Operations, client: Any, tokens: int, times: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    rng = random.Random(1)
    long = sessions.open().reply["id"]
    for number in range(_PIECES):
        ids = random_ids(rng, tokens // _PIECES, random_model.VOCABULARY)
        sessions.append(long, 1, input_ids=ids)
        say(f"{(number + 1) * tokens // _PIECES} tokens computed")
    _warm(sessions, rng)
    begun = memory.of(server)
    tree = client.get("/v1/tree").json()
    forks = [sessions.fork(long) for _ in range(times)]
    after_forks, tree_then = memory.of(server), client.get("/v1/tree").json()
    earlier = [sessions.fork(long, 1 + number % _PIECES) for number in range(times)]
    say(f"{2 * times} forks")
    turns = [
        sessions.append(fork.reply["id"], 1, input_ids=_delta(rng)) for fork in (*forks, *earlier)
    ]
    say("their first turns")
    backs, later = [], []
    sessions.append(long, 1, input_ids=_delta(rng))
    before = memory.of(server)
    for _ in range(times):
        backs.append(sessions.roll_back(long, _PIECES))
        later.append(sessions.append(long, 1, input_ids=_delta(rng)))
    ended = memory.of(server)
    say(f"{times} rollbacks")
    figures: dict[str, Figure] = {
        "fork_tokens": forks[0].reply["tokens"],
        **milliseconds("fork_ms", [each.seconds for each in forks]),
        **milliseconds("fork_earlier_ms", [each.seconds for each in earlier]),
        "fork_computed_tokens": tree_then["tokens"] - tree["tokens"],
        "fork_turn_beyond_delta_max": _beyond(turns),
        **milliseconds("fork_turn_ttft_ms", [each.ttft_s for each in turns]),
        **milliseconds("rollback_ms", [each.seconds for each in backs]),
        "rollback_turn_beyond_delta_max": _beyond(later),
        **milliseconds("rollback_turn_ttft_ms", [each.ttft_s for each in later]),
    }
    for name in begun:
        figures[f"fork_bytes_each_{name}"] = (after_forks[name].rss - begun[name].rss) // times
        figures[f"rollback_bytes_each_{name}"] = (ended[name].rss - before[name].rss) // times
    details = {"memory": {"before": begun, "forks": after_forks, "rollbacks": ended}}
    return figures, details


def _warm(sessions: Operations, rng: random.Random) -> None:
    """Do everything once, so that nothing is measured that is done for the first time."""
    small = sessions.open().reply["id"]
    sessions.append(small, 1, input_ids=_delta(rng))
    for _ in range(10):
        fork = sessions.fork(small).reply["id"]
        sessions.append(fork, 1, input_ids=_delta(rng))
        sessions.roll_back(fork, 1)
        sessions.close(fork)


def _delta(rng: random.Random) -> list[int]:
    return random_ids(rng, _DELTA, random_model.VOCABULARY)


def _beyond(turns: list[Turn]) -> int:
    """Most tokens that a turn computed beside its delta: its history's that were not there."""
    return max(turn.computed - turn.usage["delta_tokens"] for turn in turns)
