"""Kills a service and its journal at every named point of a change, and looks what is left.

    python tests/unit/recovery_runs.py --kills 2000 --json FILE

Each run is a process of three clients at once, forked from one that has imported everything, which
kills itself. Another one then opens the journal, looks for every answered change, asks for the
interrupted ones again under their keys, and goes on to the end of the script: all that it finds has
to be what a twin has that nobody interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import disk_runs
from commit_points import AT_THE_DISK, POINTS, Death
from engine_double import EngineDouble
from one_tenant import ME
from recovery_fork import Tell, compiled, forget, forked
from recovery_script import LANES, OPERATIONS, Client, lane

from stateful_sglang.service.commands import ListSessions
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.errors import SessionError
from stateful_sglang.session.journal.sqlite import SqliteJournal

MOST_SCRIPTS = 24
MEMORY = Path("/dev/shm")
"""Where journals are, if there is such a thing: what a process has written outlives it there too,
and a sync takes no time."""


async def whole(seed: int, tell: Tell) -> None:
    """The twin that nobody interrupts: every answer, and what each session is at the end."""
    service = SessionService(EngineDouble(), SqliteJournal.connect(None))
    for number in range(LANES):
        client = Client(service, number)
        answers = [await client.do(at, op) for at, op in enumerate(lane(seed, number))]
        seen = [await client.seen(which) for which in range(len(client.ids))]
        tell({"answers": answers, "seen": seen})
    await service.shutdown()


async def dying(
    path: Path,
    library: Path | None,
    seed: int,
    point: str,
    tell: Tell,
    *,
    armed_at: tuple[int, int],
    spared: int,
) -> None:
    """Do what the script says until the process is killed."""
    death = Death(spared)
    POINTS[point](death, library or Path())
    service = SessionService(EngineDouble(), SqliteJournal.connect(path))

    async def play(number: int) -> None:
        client = Client(service, number)
        for at, op in enumerate(lane(seed, number)):
            if (number, at) == armed_at:
                death.arm()
            tell({"ask": [number, at]})
            answer = await client.do(at, op)
            if point == "before the answer":
                death()
            tell({"ack": [number, at], "answer": answer, "ids": client.ids})
            if point == "answered":
                death()

    await asyncio.gather(*map(play, range(LANES)))


class Findings:
    """What a run left to be desired."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []

    def add(self, kind: str, note: str) -> None:
        self.counts[kind] += 1
        self.notes.append(f"{kind}: {note[-600:]}")


async def look(
    path: Path, seed: int, told: list[dict[str, Any]], twin: list[dict[str, Any]], tell: Tell
) -> None:
    """Open what is left and hold it against the twin."""
    service = SessionService(EngineDouble(), SqliteJournal.connect(path))
    findings = Findings()
    for number in range(LANES):
        acked = {each["ack"][1]: each for each in told if each.get("ack", [-1])[0] == number}
        try:
            await _look_at_lane(service, seed, number, acked, twin[number], findings)
        except Exception:
            findings.add("wrong", traceback.format_exc())
    total = (await service.list(ME, ListSessions())).total
    expected = sum(len(each["seen"]) for each in twin)
    if total != expected:
        findings.add("duplicated", f"{total} sessions in place of {expected}")
    await service.shutdown()
    tell({"counts": findings.counts, "notes": findings.notes})


async def _look_at_lane(
    service: SessionService,
    seed: int,
    number: int,
    acked: Mapping[int, dict[str, Any]],
    twin: Mapping[str, Any],
    findings: Findings,
) -> None:
    client = Client(service, number)
    ops = lane(seed, number)
    if acked:
        client.ids = list(acked[max(acked)]["ids"])
    for at, each in acked.items():
        if each["answer"] != twin["answers"][at]:
            findings.add("wrong", f"{ops[at]} before the kill: {each['answer']}")
    try:
        found = [(await client.seen(which))["commits"] for which in range(len(client.ids))]
    except SessionError as error:
        findings.add("lost", f"a session: {error}")
        return
    for at in acked:
        op, version = ops[at], str(twin["answers"][at]["version"])
        if op.kind in ("append", "ingest", "edit"):
            commit = twin["seen"][op.which]["commits"].get(version)
            if found[op.which].get(version) != commit:
                findings.add("lost", f"{op}: {found[op.which].get(version)}")
    for at in range(len(ops)):
        again = [await client.do(at, ops[at])]
        if at <= len(acked):  # kept, or interrupted: asked once more, nothing is done again
            again.append(await client.do(at, ops[at]))
        for answer in again:
            if answer != twin["answers"][at]:
                kind = "wrong" if at > len(acked) or answer is again[0] else "duplicated"
                findings.add(kind, f"{ops[at]} again: {answer}, not {twin['answers'][at]}")
    seen = [await client.seen(which) for which in range(len(client.ids))]
    for ours, its in zip(seen, twin["seen"], strict=False):
        if len(ours["commits"]) > len(its["commits"]):
            findings.add("duplicated", f"versions {sorted(ours['commits'])}")
        elif ours != its:
            findings.add("wrong", f"at the end {ours}, not {its}"[:500])
    if len(seen) != len(twin["seen"]):
        findings.add("duplicated", f"a lane has {len(seen)} sessions, not {len(twin['seen'])}")


class Run(NamedTuple):
    """A process that was killed, and what was found afterwards."""

    point: str
    published: int
    """Changes that it had answered."""
    wrong: Mapping[str, int]
    """Counts of changes ``lost``, ``duplicated`` and ``wrong``."""
    notes: list[str]


def runs(
    kills: int, folder: Path, library: Path | None, seed: int = 0, wanted: Sequence[str] = ()
) -> Iterator[Run]:
    """Kill so many processes, at every point in turn.

    Args:
        kills: How many.
        folder: For their journals.
        library: What stands before the disk, preloaded; None: points there are left out.
        seed: Of what is chosen at random.
        wanted: Points; all if none.
    """
    rng = random.Random(seed)
    points = [name for name in wanted or POINTS if library is not None or name not in AT_THE_DISK]
    twins = [_twin(script) for script in range(min(MOST_SCRIPTS, 1 + kills // 30))]
    path = folder / "run.sqlite3"
    done = 0
    while done < kills:
        point, script = points[done % len(points)], rng.randrange(len(twins))
        # Points that one operation passes once are passed by all three clients.
        spared = rng.choice((0, 0, 0, 1, 2, 3, 5, 8))
        armed_at = (rng.randrange(LANES), rng.randrange(OPERATIONS - 1))
        forget(path)
        told, status = forked(
            partial(dying, path, library, script, point, armed_at=armed_at, spared=spared)
        )
        if status == 0:
            continue  # it was armed too late to come to that point
        if status != -signal.SIGKILL:
            raise RuntimeError(f"{point}: the process ended by itself: {told[-1:]}")
        done += 1
        published = sum("ack" in each for each in told)
        looked, status = forked(partial(look, path, script, told, twins[script]))
        if status or len(looked) != 1:
            yield Run(point, published, {"wrong": 1}, [f"{point}: {looked}"])
        else:
            notes = [f"{point}: {note}" for note in looked[0]["notes"]]
            yield Run(point, published, looked[0]["counts"], notes)


def _twin(script: int) -> list[dict[str, Any]]:
    told, status = forked(partial(whole, script))
    if status or len(told) != LANES:
        raise RuntimeError(f"the twin of script {script} failed: {told}")
    return told


def preload(library: Path | None) -> None:
    """Begin anew with the library before the disk, unless it is there already."""
    if library is not None and os.environ.get("LD_PRELOAD") != str(library):
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--point", action="append", choices=[*POINTS], help="all if none")
    parser.add_argument("--disk-runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    logging.disable()  # of failures that are made
    preloaded = os.environ.get("LD_PRELOAD")
    place = Path(tempfile.mkdtemp() if preloaded is None else preloaded)
    library: Path | None
    if preloaded is None:
        library = compiled(place)
        preload(library)
    else:
        library, place = place, place.parent
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            told = measure(asked, Path(folder), library)
    finally:
        shutil.rmtree(place)
    asked.json.write_text(json.dumps(told, indent=1) + "\n")


def measure(asked: argparse.Namespace, place: Path, library: Path | None) -> dict[str, Any]:
    """Figures of kills and of failing disks, and where they come from."""
    wrong, points, disk = Counter[str](), Counter[str](), Counter[str]()
    notes: list[str] = []
    published = 0
    began = time.monotonic()
    killed = runs(asked.kills, place, library, asked.seed, asked.point or ())
    for number, run in enumerate(killed, 1):
        points[run.point] += 1
        wrong.update(run.wrong)
        notes += run.notes
        published += run.published
        if number % 100 == 0:
            left = (time.monotonic() - began) / number * (asked.kills - number) / 60
            said = f"{number}/{asked.kills} kills, found: {dict(wrong)}, about {left:.1f} min left"
            print(said, file=sys.stderr, flush=True)
    kills_s = time.monotonic() - began
    if library is not None:
        for counts, errors in disk_runs.runs(asked.disk_runs, place, library):
            disk.update(counts)
            notes += errors
    kinds = ("lost", "duplicated", "wrong")
    figures = {
        "point_kills": points.total(),
        "point_published": published,
        **{f"point_{kind}": wrong[kind] for kind in kinds},
        "point_s": round(kills_s, 1),
        "disk_runs": asked.disk_runs if library is not None else 0,
        **{f"disk_{kind}": count for kind, count in disk.items()},
    }
    return {"figures": figures, "points": points, "notes": notes[:100]}


if __name__ == "__main__":
    main()
