"""Clients that leave in the middle of a turn, each followed at once by the session's next append.

A client streams, or waits for the whole answer, and closes its connection, in order or with a
reset, before the first token or while some are still to come. The moment it has closed it, another
request appends to the same session, every second one with ``on_busy: fail``. What is told: answers
that were a conflict (409), any other refusal, and what was left a second after a round of leaving
clients: requests in the scheduler, busy sessions, KV that somebody still holds or that is lost.

    python -m bench.suites.leave --leaves 1000 --json leave.json
"""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from bench import corpus
from bench.engines.leaving import leave, random_leave
from bench.harness import http
from bench.harness.command import run
from bench.harness.figures import report
from bench.harness.options import Json, Seed, ServerArguments
from bench.harness.rounds import Left, say
from bench.harness.server import serve

_ARGUMENTS = ("--context-length", "8192", "--max-total-tokens", "30000", "--keys", "off")
LEAVES_OF_A_SESSION = 24
"""Before another takes its place, while it fits into the context."""
QUIET_S = 1.0
_LONGEST_S = 0.8
KINDS = ("requests", "busy_sessions", "held_tokens")
"""Of what is left over, those that are there while turns run."""
_ABANDONED = {"temperature": 0.7, "max_tokens": 200, "ignore_eos": True}


class Lane:
    """One session after another, left and continued."""

    def __init__(self, client: httpx.Client, rng: random.Random, texts: list[str]) -> None:
        self._client = client
        self._rng = rng
        self._texts = texts
        self._count = itertools.count()
        self._session = ""
        self._version = 0
        self.found: Counter[str] = Counter()
        self.notes: list[str] = []

    def once(self) -> None:
        """Leave one turn, and continue the session at once."""
        number = next(self._count)
        if number % LEAVES_OF_A_SESSION == 0:
            self._open()
        path = f"/v1/sessions/{self._session}/append"
        said = self._said()
        url = self._client.base_url
        how = random_leave(self._rng, _LONGEST_S)
        body = {"messages": said, "sampling": _ABANDONED}
        over = leave((url.host, url.port or 80), path, body, how)
        self.found["leaves"] += not over
        self.found["too_late"] += over
        following = {
            "messages": self._said(),
            "sampling": {"temperature": 0, "max_tokens": 4},
            "on_busy": "fail" if number % 2 else "wait",
        }
        began = time.monotonic()
        reply = self._client.post(path, json=following)
        took = time.monotonic() - began
        self.found["conflicts"] += reply.status_code == httpx.codes.CONFLICT
        if not reply.is_success:
            self.found["refused"] += reply.status_code != httpx.codes.CONFLICT
            self.notes.append(f"{how}, {following['on_busy']}, after {took:.2f} s: {reply.text}")
            self._version = self._client.get(path.removesuffix("/append")).json()["version"]
            return
        version = reply.json()["version"]
        # One more where the end beat the abort: that turn was committed.
        self.found["finished"] += version == self._version + 2
        self.found["wrong_versions"] += not 1 <= version - self._version <= 2
        self._version = version

    def _open(self) -> None:
        if self._session:
            self._client.delete(f"/v1/sessions/{self._session}").raise_for_status()
        opened = self._client.post("/v1/sessions", json={"system": "Answer."}).raise_for_status()
        self._session, self._version = opened.json()["id"], 0

    def _said(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._rng.choice(self._texts)}]


def left_over(client: httpx.Client) -> Counter[str]:
    """What somebody holds though nobody asks for anything."""
    # The scheduler tells its load when it takes a prompt in, and when nothing is left to do: so one
    # is told now, in which whatever runs is counted.
    probe = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    client.post("/generate", json=probe).raise_for_status()
    loads = client.get("/v1/loads").raise_for_status().json()["loads"]
    tree = client.get("/v1/tree").raise_for_status().json()
    busy = client.get("/v1/sessions", params={"limit": 1000}).raise_for_status().json()["sessions"]
    used = sum(load["num_used_tokens"] for load in loads)
    return Counter(
        requests=sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads),
        busy_sessions=sum(each["busy"] for each in busy),
        held_tokens=tree["protected_tokens"],
        lost_tokens=max(0, used - tree["tokens"]),
    )


def main(
    leaves: Annotated[int, typer.Option(min=1, help="Turns that are abandoned.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Sessions at once.")] = 8,
    seed: Seed = 1,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Measure and print; exit status 1 where there was a conflict, a refusal or a zombie."""
    texts = corpus.excerpts(40)
    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    at_work: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        journal = ("--journal", str(Path(folder) / "leave.sqlite3"))
        with (
            serve(*_ARGUMENTS, *journal, *(server_arguments or ())) as server,
            http.client(server.url) as client,
            concurrent.futures.ThreadPoolExecutor(clients) as pool,
        ):
            lanes = [Lane(client, random.Random(f"{seed} {n}"), texts) for n in range(clients)]
            rounds, time_left = 0, Left(-(-leaves // clients))
            while found["leaves"] < leaves:
                running = [pool.submit(lane.once) for lane in lanes]
                time.sleep(_LONGEST_S / 4)
                at_work += +left_over(client)
                for each in running:
                    each.result()
                time.sleep(QUIET_S)
                left = +left_over(client)
                found["zombies"] += len(left)
                kinds += left
                rounds += 1
                found["leaves"] = sum(lane.found["leaves"] for lane in lanes)
                still = time_left.one_more()
                if rounds % 10 == 0:
                    totals: Counter[str] = sum((lane.found for lane in lanes), Counter())
                    say(f"round {still}: {dict(totals)}, left over: {dict(kinds)}")
    totals = sum((lane.found for lane in lanes), Counter())
    names = ("leaves", "conflicts", "refused", "finished", "too_late", "wrong_versions")
    figures: dict[str, Any] = {name: totals[name] for name in names}
    figures |= {"zombies": found["zombies"], "quiet_points": rounds}
    # What the same questions told while turns ran: of zombies they would tell as well.
    figures |= {f"at_work_{name}": at_work[name] for name in KINDS}
    notes = [note for lane in lanes for note in lane.notes]
    report(figures, json, left_over=kinds, notes=notes[:100])
    for note in notes[:20]:
        print(note)
    bad = ("conflicts", "refused", "wrong_versions", "zombies")
    return int(any(figures[name] for name in bad))


if __name__ == "__main__":
    run(main)
