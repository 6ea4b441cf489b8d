"""Does anything wedge or break when 64 sessions want four times the KV pool: statuses, latencies.

In a run 64 clients at once take 8 turns each, in a pool for a quarter of what they come to hold.
At random they fork and go on in the fork, go back to an earlier version, add messages before they
ask for an answer, ask something aside, and leave in the middle of a turn to come back at once, with
the key of what they left or with something else. Answers are sampled, every other one is streamed.
A run is settled when nothing runs and every token of the pool is free or in the tree.

    python -m bench burst --json burst.json
    python -m bench burst --runs 4 --real-runs 0
"""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import random
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from bench.harness import http
from bench.harness.figures import Figure, report
from bench.harness.options import Json, Seed, ServerArguments
from bench.harness.rounds import say
from bench.harness.server import Server, serve
from bench.workloads.prompts import passage

SESSIONS, TURNS = 64, 8
POOL_SHARE = 4
"""One over the share of all sessions' tokens that the pool has room for."""
OUTPUT = 16
TURN_TOKENS = 112
"""About what a turn adds to a session: a message, the template's own tokens, the answer."""
CONTEXT = 2048
WEDGED_S = 300.0
"""A request that takes longer is wedged: on a small machine it waits a minute for others."""
SETTLED_S = 10.0
BYTES_A_TOKEN = 4
"""Of English text in the embedded model's tokens; the small model's tokens are bytes."""
DEEDS = {
    "append": 12,
    "leave": 4,
    "leave and repeat": 2,
    "fork": 2,
    "roll back": 2,
    "ingest": 2,
    "aside": 2,
}
"""What comes before an append, and how often."""


@dataclass
class Seen:
    """What the clients of all runs saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Seconds of each turn that was read to its end."""
    left: int = 0
    wedged: int = 0
    broken: int = 0
    """Connections that broke, and streams that ended without a turn or an error."""
    unsettled: int = 0
    """Runs after which the pool did not add up, or something still ran."""
    unsaid: list[str] = field(default_factory=list)
    """What errors said, the first ones."""

    def count(self, status: int, body: str) -> None:
        """A response, or the error that ended a stream."""
        self.statuses[status] += 1
        if status >= 400 and len(self.unsaid) < 20:
            self.unsaid.append(f"{status}: {body[:400]}")


class Talker:
    """One client with one session at a time."""

    def __init__(self, client: httpx.AsyncClient, seen: Seen, rng: random.Random, size: int):
        self._client = client
        self._seen = seen
        self._rng = rng
        self._size = size
        self._session = ""
        self._ways: dict[int, tuple[int, ...]] = {}
        """Versions of the session, each with those on the way to it."""
        self._tip = 0

    async def talk(self) -> None:
        """Open, take all turns, close."""
        opened = await self._post("/v1/sessions", {"system": self._said()[: self._size // 2]})
        if opened is None:
            return
        self._session, self._ways = opened["id"], {0: ()}
        for _ in range(TURNS):
            (deed,) = self._rng.choices([*DEEDS], [*DEEDS.values()])
            await self._do(deed)
        await self._request("DELETE", f"/v1/sessions/{self._session}", None)

    async def _do(self, deed: str) -> None:
        body = self._body()
        match deed:
            case "leave":
                await self._leave(body)
                body = self._body()
            case "leave and repeat":
                body["idempotency_key"] = secrets.token_hex(8)
                await self._leave(body)
            case "fork":
                await self._fork()
            case "roll back":
                version = self._rng.choice([*self._ways])
                if await self._post(self._at("rollback"), {"version": version}) is not None:
                    self._tip = version
            case "ingest":
                self._at_version(
                    await self._post(self._at("ingest"), {"messages": body["messages"]})
                )
            case "aside":
                await self._turn({**self._body(), "ephemeral": True})
        self._at_version(await self._turn(body))

    def _at_version(self, reply: dict[str, Any] | None) -> None:
        if reply is not None:
            way = (*self._ways[self._tip], self._tip)
            self._tip = reply["version"]
            self._ways[self._tip] = way

    async def _fork(self) -> None:
        version = self._rng.choice([*self._ways])
        forked = await self._post(self._at("fork"), {"version": version})
        if forked is not None:
            await self._request("DELETE", f"/v1/sessions/{self._session}", None)
            self._session, self._tip = forked["id"], version
            kept = (*self._ways[version], version)
            self._ways = {each: self._ways[each] for each in kept}

    def _at(self, operation: str) -> str:
        return f"/v1/sessions/{self._session}/{operation}"

    def _said(self) -> str:
        return passage(self._rng.randrange(1000), self._size)[: self._size]

    def _body(self) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": self._said()}],
            "sampling": {"max_tokens": OUTPUT, "temperature": 0.8},
            "stream": self._rng.random() < 0.5,
        }

    async def _leave(self, body: dict[str, Any]) -> None:
        """Begin a turn and be gone after a while, whatever has happened by then."""
        self._seen.left += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.random() ** 3):
                await self._answer(body)

    async def _turn(self, body: dict[str, Any]) -> dict[str, Any] | None:
        began = time.perf_counter()
        turn = await self._answer(body)
        if turn is not None:
            self._seen.latencies.append(time.perf_counter() - began)
        return turn

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any] | None:
        if body["stream"]:
            return await self._stream(body)
        return await self._post(self._at("append"), body)

    async def _stream(self, body: dict[str, Any]) -> dict[str, Any] | None:
        async with self._counted():
            async with self._client.stream("POST", self._at("append"), json=body) as reply:
                if reply.is_error:
                    self._seen.count(reply.status_code, (await reply.aread()).decode())
                    return None
                name = ""
                async for line in reply.aiter_lines():
                    key, _, value = line.partition(": ")
                    if key == "event":
                        name = value
                    elif key == "data" and name == "done":
                        self._seen.count(reply.status_code, "")
                        turn: dict[str, Any] = jsonlib.loads(value)
                        return turn
                    elif key == "data" and name == "error":
                        self._seen.count(jsonlib.loads(value)["error"]["status"], value)
                        return None
            self._seen.broken += 1
        return None

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return await self._request("POST", path, body)

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        async with self._counted():
            reply = await self._client.request(method, path, json=body)
            self._seen.count(reply.status_code, reply.text)
            if reply.is_success:
                form: dict[str, Any] = reply.json()
                return form
        return None

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """A request, of which is kept whether it wedged or broke."""
        try:
            async with asyncio.timeout(WEDGED_S):
                yield
        except TimeoutError:
            self._seen.wedged += 1
        except httpx.TransportError as error:
            self._seen.broken += 1
            self._seen.unsaid.append(repr(error))


async def run_once(server: Server, seen: Seen, rng: random.Random, size: int) -> None:
    """All clients at once."""
    async with http.async_client(server.url, timeout_s=2 * WEDGED_S) as client:
        talkers = [Talker(client, seen, random.Random(rng.random()), size) for _ in range(SESSIONS)]
        await asyncio.gather(*(talker.talk() for talker in talkers))
        seen.unsettled += not await settled(client)


async def settled(client: httpx.AsyncClient) -> bool:
    """Whether soon nothing runs, and each token of the pool is free or in the tree."""
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline:
        (load,) = (await client.get("/v1/loads")).json()["loads"]
        tree = (await client.get("/v1/tree")).json()
        held = [load[f"num_{what}"] for what in ("running_reqs", "waiting_reqs", "used_tokens")]
        held += [tree["protected_tokens"], tree["tokens"] - tree["evictable_tokens"]]
        held.append(tree["sessions"])
        if not any(held):
            return True
        await asyncio.sleep(0.05)
    return False


def measure(
    arguments: list[str], runs: int, size: int, rng: random.Random, seen: Seen
) -> Generator[int, None, None]:
    """Some runs on one server; yields how many are done after each."""
    pool = SESSIONS * TURNS * TURN_TOKENS // POOL_SHARE
    settings = ["--context-length", str(CONTEXT), "--max-total-tokens", str(pool)]
    with serve(*arguments, *settings) as server:
        began = time.monotonic()
        for number in range(1, runs + 1):
            asyncio.run(run_once(server, seen, rng, size))
            took = time.monotonic() - began
            statuses = dict(sorted(seen.statuses.items()))
            left = took / number * (runs - number)
            say(f"run {number} of {runs}: {took:.0f} s so far, {left:.0f} s left; {statuses}")
            yield number


def figures(prefix: str, runs: int, seen: Seen) -> dict[str, Figure]:
    """What is told of some runs."""
    told: dict[str, Figure] = {"runs": runs, "turns": len(seen.latencies), "left": seen.left}
    for kind in (2, 4, 5):
        told[f"status_{kind}xx"] = sum(n for s, n in seen.statuses.items() if s // 100 == kind)
    told |= {"wedged": seen.wedged, "broken": seen.broken, "unsettled": seen.unsettled}
    for part in (50, 99):
        took = float(np.percentile(seen.latencies, part)) if seen.latencies else None
        told[f"p{part}_ms"] = None if took is None else round(1e3 * took, 1)
    return {f"{prefix}{name}": value for name, value in told.items()}


def main(
    runs: Annotated[int, typer.Option(min=0, help="With a random model of one layer.")] = 48,
    real_runs: Annotated[int, typer.Option(min=0, help="With the embedded model.")] = 2,
    seed: Seed = None,
    json: Json = None,
    arguments: ServerArguments = None,
) -> int:
    """Exit status 1 where something wedged, broke or was answered with 4xx or 5xx.

    Interrupted, it tells of the runs that were done by then.
    """
    from bench.engines import tiny

    seed = secrets.randbelow(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    more = arguments or []
    told: dict[str, Figure] = {"seed": seed}
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        model = tiny.save(Path(folder), layers=1, context=CONTEXT)
        own = ["--model-path", str(model), "--dtype", "float32"]
        for prefix, count, start, size in (
            ("", runs, own, TURN_TOKENS // 2),
            ("real_", real_runs, [], TURN_TOKENS // 2 * BYTES_A_TOKEN),
        ):
            if not count:
                continue
            seen = Seen()
            with contextlib.closing(measure([*start, *more], count, size, rng, seen)) as measured:
                for done in measured:
                    told |= figures(prefix, done, seen)
                    statuses = {str(status): n for status, n in seen.statuses.items()}
                    details |= {f"{prefix}statuses": statuses, f"{prefix}errors": seen.unsaid}
            for said in seen.unsaid:
                say(said)
    report(told, json, **details)
    bad = ("4xx", "5xx", "wedged", "broken", "unsettled")
    return int(any(value for name, value in told.items() if name.endswith(bad)))


if __name__ == "__main__":
    raise SystemExit(typer.run(main))
