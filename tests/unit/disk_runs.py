"""A server whose disk is full, or does not sync, at random moments, and which is killed at last.

The routes, the service and the journal's file are real; clients ask over HTTP within the process.
Each run makes the disk fail and work again some times, and kills the process while it works.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from engine_double import EngineDouble
from one_tenant import ME
from recovery_fork import Tell, forget, forked
from session_server import app_of

from stateful_sglang.service.commands import ListSessions
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.journal.sqlite import SqliteJournal

LANES, ROUNDS, CONTEXT = 4, 6, 200_000
MODES = (1, 2, 3, 4)
"""See `journal_faults.c`."""
REASONS = ("no room left", "FSYNC", "IOERR", "FULL", "CANTOPEN")


class UnservedError(AssertionError):
    """The server did not do what it has to while its disk fails, or when it works again."""


async def _failing(path: Path, library: Path, seed: int, tell: Tell) -> None:
    rng = random.Random(seed)
    shim = ctypes.CDLL(str(library))
    mode = ctypes.c_int.in_dll(shim, "fault_mode")
    journal = SqliteJournal.connect(path)
    app = app_of(EngineDouble(), service=SessionService(EngineDouble(CONTEXT), journal))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        lanes = [await _opened(client, number, tell) for number in range(LANES)]
        for _ in range(ROUNDS):
            mode.value = rng.choice(MODES)
            failing = [asyncio.create_task(_ask(client, rng, *each, tell)) for each in lanes]
            await asyncio.sleep(rng.uniform(0.002, 0.05))
            mode.value = 0
            await asyncio.gather(*failing)
            # A connection of SQLite's that failed is made anew by whoever comes next.
            for each in lanes:
                await _until_served(client, rng, *each, tell)
        tell({"faults": ctypes.c_int.in_dll(shim, "fault_count").value})
    os.kill(os.getpid(), signal.SIGKILL)


async def _opened(client: httpx.AsyncClient, number: int, tell: Tell) -> tuple[str, list[int]]:
    reply = await client.post("/v1/sessions", json={"system": f"lane {number}"})
    session_id = reply.raise_for_status().json()["id"]
    tell({"opened": session_id})
    return session_id, [0]


async def _ask(
    client: httpx.AsyncClient, rng: random.Random, session_id: str, said: list[int], tell: Tell
) -> bool:
    """Change the session; whether it was done. What was refused is not said again."""
    said[0] += 1
    text = f"[{session_id[-6:]}-{said[0]}]" + "x" * rng.choice((1, 3000))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "idempotency_key": f"{said[0]}",
    }
    what = rng.choice(("append", "append", "ingest"))
    reply = await client.post(f"/v1/sessions/{session_id}/{what}", json=body)
    tell({"text": text, "session": session_id, "status": reply.status_code})
    if reply.status_code == 507:
        error = reply.json()["error"]
        if error["type"] not in ("commit_failed", "journal_failed"):
            raise UnservedError(f"507 of type {error['type']}")
        if not any(reason in error["message"] for reason in REASONS):
            raise UnservedError(f"no reason in {error['message']!r}")
    elif reply.status_code != 200:
        raise UnservedError(f"{what}: {reply.status_code} {reply.text}")
    return reply.status_code == 200


async def _until_served(
    client: httpx.AsyncClient, rng: random.Random, session_id: str, said: list[int], tell: Tell
) -> None:
    for _ in range(20):
        if await _ask(client, rng, session_id, said, tell):
            return
        await asyncio.sleep(0.1)
    raise UnservedError("the disk works again, and nothing is recorded")


async def _look(path: Path, told: list[dict[str, Any]], tell: Tell) -> None:
    """Hold the file against the answers."""
    service = SessionService(EngineDouble(CONTEXT), SqliteJournal.connect(path))
    found: Counter[str] = Counter()
    sessions = (await service.list(ME, ListSessions(limit=1000))).sessions
    for view in sessions:
        texts: set[str] = set()
        for version in range(view.version + 1):
            with suppress(LookupError):
                seen = await service.messages(ME, view.id, version)
                texts |= {each.content for each in (*seen.messages, *seen.pending)}
        for each in told:
            if each.get("session") == view.id:
                there = each["text"] in texts
                found["lost"] += each["status"] == 200 and not there
                found["refused_found"] += each["status"] == 507 and there
    found["lost"] += len({each["opened"] for each in told if "opened" in each}) - len(sessions)
    await service.shutdown()
    tell(found)


def runs(number: int, folder: Path, library: Path) -> Iterator[tuple[Mapping[str, int], list[str]]]:
    """So many runs.

    Yields:
        Counts of a run: ``published``, ``refused``, ``faults``, and what was found wrong: ``lost``,
        ``refused_found``, ``unserved``; with notes on that.
    """
    path = folder / "disk.sqlite3"
    for seed in range(number):
        forget(path)
        told, status = forked(lambda tell, seed=seed: _failing(path, library, seed, tell))
        looked, _ = forked(lambda tell, told=told: _look(path, told, tell))
        notes = [each["error"] for each in (*told, *looked) if "error" in each]
        yield (
            {
                "published": sum(each.get("status") == 200 for each in told),
                "refused": sum(each.get("status") == 507 for each in told),
                "faults": sum(each.get("faults", 0) for each in told),
                "lost": 0,
                "refused_found": 0,
                **(looked[0] if looked and "error" not in looked[0] else {}),
                "unserved": int(status != -signal.SIGKILL or bool(notes)),
            },
            notes,
        )
