"""Part of the bench of sessions: many idle ones, and operations on one while they are there."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.engines import random_model
from bench.engines.operations import Done, Operations
from bench.harness import http, memory, probe
from bench.harness.figures import Figure
from bench.harness.rounds import say
from bench.harness.server import Server, serve
from bench.harness.spread import milliseconds
from bench.workloads import exported

TURN = 1000
"""Tokens of a turn of an idle session."""
_BODIES = 16
"""Different sessions that are imported over and over."""
_AT_ONCE = 3
_LARGE, _LARGE_TURN = 100_000, 500
"""Tokens of sessions that are large enough to hold a server up, and of their turns."""
_QUIET_S = 12.0
"""For the service to let idle sessions go from memory, which it looks after every few seconds."""


def run(
    count: int, tokens: int, samples: int, limit_s: float, folder: Path | None, more: list[str]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Import that many sessions and use some of them, before and after a restart.

    Args:
        count: Sessions, or fewer where they take longer than `limit_s` to import.
        tokens: Of each.
        samples: Of each time.
        limit_s: Seconds.
        folder: For the journal; the temporary one's if none.
        more: Arguments of the launcher.
    """
    room = max(2 * tokens, _LARGE) + 8192
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = random_model.save(Path(place) / "model", room)
        journal = Path(place) / "journal.sqlite3"
        arguments = (*random_model.arguments(model, room, 2 * room), "--journal", str(journal))
        arguments = (*arguments, *more)
        part = _Idle(model / "tokenizer.json", tokens, samples)
        with ExitStack() as running:
            server = running.enter_context(serve(*arguments))
            part.before(server, running, count, limit_s)
        part.figures["journal_bytes"] = journal.stat().st_size
        part.figures["journal_bytes_a_token"] = round(journal.stat().st_size / part.tokens_in, 2)
        with ExitStack() as running:
            began = time.perf_counter()
            server = running.enter_context(serve(*arguments))
            part.figures["restart_s"] = round(time.perf_counter() - began, 1)
            part.after(server, running)
        return part.figures, {"memory": part.memory}


class _Idle:
    def __init__(self, tokenizer: Path, tokens: int, samples: int) -> None:
        self._tokens, self._samples = tokens, samples
        self._pieces = exported.Pieces(tokenizer, TURN)
        self._large_pieces = exported.Pieces(tokenizer, _LARGE_TURN)
        self._ids: list[str] = []
        self._large: list[str] = []
        self.tokens_in = 0
        self.figures: dict[str, Figure] = {}
        self.memory: dict[str, dict[str, memory.Memory]] = {}

    def before(self, server: Server, running: ExitStack, count: int, limit_s: float) -> None:
        """Import, and use what is there."""
        sessions = Operations(running.enter_context(http.client(server.url)))
        small = sessions.open().reply["id"]
        sessions.append(small, 4, input_ids=[*range(200, 300)])
        empty = sessions.export(sessions.open().reply["id"]).reply
        self._use(sessions, "few", lambda _: small)
        self._remember("begin", server)
        bodies = [
            exported.session(
                empty, self._pieces, 20 * number, self._tokens // TURN, {"of": str(number)}
            )
            for number in range(_BODIES)
        ]
        began = time.perf_counter()
        self._ids = _taken_in(server, bodies, count, limit_s)
        took = time.perf_counter() - began
        self.tokens_in += len(self._ids) * self._tokens
        self.figures |= {
            "idle_sessions": len(self._ids),
            "idle_tokens_each": self._tokens,
            "import_sessions_s": round(len(self._ids) / took, 1),
        }
        time.sleep(_QUIET_S)
        self._remember("idle", server)
        # The server lets the oldest expire where an opening is one too many: these stay. Few of
        # them are in memory.
        self._ids = self._ids[len(self._ids) // 5 :]
        step = max(1, len(self._ids) // self._samples)
        self._use(sessions, "many", lambda number: self._ids[(number * step) % len(self._ids)])
        self._large_ones(server, sessions, empty)

    def after(self, server: Server, running: ExitStack) -> None:
        """First uses of sessions that only the file has."""
        sessions = Operations(running.enter_context(http.client(server.url)))
        self._remember("restarted", server)
        step = max(1, len(self._ids) // self._samples)
        chosen = self._ids[step // 2 :: step][: self._samples]
        self.figures |= milliseconds(
            "restarted_get_ms", [sessions.get(each).seconds for each in chosen]
        )
        turns = [sessions.append(each, 4, text=" and then") for each in chosen[:10]]
        self.figures |= milliseconds("restarted_append_ttft_ms", [each.ttft_s for each in turns])
        self.figures["restarted_append_computed"] = turns[-1].computed
        small = sessions.open().reply["id"]
        waits = []
        for session_id in self._large:
            with probe.answered(server.url, f"/v1/sessions/{small}") as took:
                sessions.get(session_id)
            waits.append(max(took))
        self.figures["others_wait_ms_restore"] = _worst(waits)
        time.sleep(_QUIET_S)
        self._remember("restarted_used", server)

    def _use(self, sessions: Operations, name: str, session_at: Callable[[int], str]) -> None:
        """Time the operations: opening one, and using those that `session_at` gives."""
        samples = self._samples
        opened = [sessions.open() for _ in range(samples)]
        for each in opened:
            sessions.close(each.reply["id"])
        got = [sessions.get(session_at(number)) for number in range(samples)]
        listed = [sessions.list(limit=100) for _ in range(samples)]
        self.figures |= milliseconds(f"open_ms_{name}", _seconds(opened))
        self.figures |= milliseconds(f"get_ms_{name}", _seconds(got))
        self.figures |= milliseconds(f"list_ms_{name}", _seconds(listed))
        mine = sessions.open().reply["id"]
        turns = [sessions.append(mine, 2, input_ids=[*range(200, 264)]) for _ in range(samples)]
        sessions.close(mine)
        self.figures |= milliseconds(f"append_ms_{name}", [each.total_s for each in turns])

    def _large_ones(self, server: Server, sessions: Operations, empty: dict[str, Any]) -> None:
        """How long others wait while a large session is taken in, or given out."""
        small = sessions.open().reply["id"]
        waits: dict[str, list[float]] = {"import": [], "export": []}
        took: dict[str, list[float]] = {"import": [], "export": []}
        for number in range(5):
            turns = _LARGE // _LARGE_TURN
            body = exported.session(empty, self._large_pieces, number, turns, {})
            with probe.answered(server.url, f"/v1/sessions/{small}") as waited:
                done = sessions.take_in(body)
            waits["import"].append(max(waited))
            took["import"].append(done.seconds)
            self._large.append(done.reply["id"])
            self.tokens_in += _LARGE
            with probe.answered(server.url, f"/v1/sessions/{small}") as waited:
                took["export"].append(sessions.export(self._large[-1]).seconds)
            waits["export"].append(max(waited))
        for name in waits:
            self.figures[f"others_wait_ms_{name}"] = _worst(waits[name])
            self.figures |= milliseconds(f"large_{name}_ms", took[name])

    def _remember(self, when: str, server: Server) -> None:
        self.memory[when] = memory.of(server)
        for name, held in self.memory[when].items():
            self.figures[f"rss_mb_{name}_{when}"] = held.rss >> 20
            self.figures[f"pss_mb_{name}_{when}"] = None if held.pss is None else held.pss >> 20


def _taken_in(server: Server, bodies: list[bytes], count: int, limit_s: float) -> list[str]:
    """Ids of `count` imported sessions, or of as many as there is time for."""
    over = time.perf_counter() + limit_s
    here = threading.local()

    def take_in(number: int) -> str | None:
        if time.perf_counter() > over:
            return None
        if not hasattr(here, "sessions"):
            here.sessions = Operations(http.client(server.url))
        taken: str = here.sessions.take_in(bodies[number % len(bodies)]).reply["id"]
        if number % 500 == 499:
            say(f"{number + 1} sessions imported")
        return taken

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [each for each in pool.map(take_in, range(count)) if each is not None]


def _seconds(done: list[Done]) -> list[float]:
    return [each.seconds for each in done]


def _worst(seconds: list[float]) -> float:
    """Milliseconds of the longest wait."""
    return round(1e3 * max(seconds), 1)
