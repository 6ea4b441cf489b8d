"""What was acknowledged is there after the process was killed, and what failed never is.

Each run is a process of its own that records turns of several sessions at once and tells what came
of each; it is killed at some moment. Disks fail by a library that is preloaded into it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from journal_rig import opened, run, turn

from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal

HERE = Path(__file__).parent
CHILD = """
import asyncio, ctypes, random, sys
from pathlib import Path
from journal_rig import answer, opened, prepared, record_of, user
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal

path, seed, library, modes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
chance = random.Random(seed)

def tell(*words):
    print(*words, flush=True)

async def work(journal, name, history):
    tell("ok", name, "-")
    number = 0
    while True:
        number += 1
        text = f"{name}-{number}"
        commit = prepared(history, range(chance.randrange(1, 900)), [user(text), answer("x" * 300)])
        tell("try", name, text)
        try:
            await journal.append(record_of(history, name, commit), commit)
        except JournalError:
            tell("no", name, text)
            await asyncio.sleep(0.002)
        else:
            history.publish(commit)
            tell("ok", name, text)

async def disturb():
    if not modes:
        return
    mode = ctypes.c_int.in_dll(ctypes.CDLL(library), "fault_mode")
    while True:
        await asyncio.sleep(chance.uniform(0.005, 0.03))
        mode.value = chance.choice(modes)
        await asyncio.sleep(chance.uniform(0.005, 0.03))
        mode.value = 0

async def main():
    journal = SqliteJournal.connect(path)
    sessions = [(f"s{n}", await opened(journal, f"s{n}")) for n in range(6)]
    await asyncio.gather(*(work(journal, *each) for each in sessions), disturb())

asyncio.run(main())
"""
RUNS = int(os.environ.get("JOURNAL_FAULT_RUNS", "0"))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("a library to preload needs a C compiler, and Linux")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "journal_faults.c", "-ldl"],
        check=True,
    )
    return library


def killed(
    path: Path, seed: int, library: Path | None = None, modes: str = "[]"
) -> list[list[str]]:
    """What a process told until it was killed, at a moment that the seed chooses."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, path, str(seed), str(library), modes],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    lines: list[str] = []
    wanted = random.Random(seed).randrange(20, 400)
    for line in process.stdout:
        lines.append(line)
        if len(lines) == wanted:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended by itself"
    return [line.split() for line in lines if line.endswith("\n")]


def hold_to_it(path: Path, told: list[list[str]]) -> tuple[int, int]:
    """Check the file against what was told; how many turns were recorded, and how many failed."""
    said = {
        outcome: {text for kind, _, text in told if kind == outcome} for outcome in ("ok", "no")
    }
    begun = {text for kind, _, text in told if kind == "try"}
    names = {name for kind, name, text in told if kind == "ok"}

    async def read(journal: SqliteJournal) -> set[str]:
        found: list[str] = []
        for name in names:
            history = await journal.load(name)
            texts = [each.content for each in history.messages(history.tip.version)]
            assert [len(each.messages) for each in history.commits[1:]] == [2] * history.tip.version
            found += [text for text in texts if text.startswith("s")]
        assert len(found) == len(set(found)), "a turn is there twice"
        return set(found)

    found = run(path, read)
    assert said["ok"] - {"-"} <= found, "an acknowledged turn is lost"
    assert not said["no"] & found, "a turn that failed was found"
    assert len(found - said["ok"] - begun) == 0
    return len(said["ok"]), len(said["no"])


@pytest.mark.parametrize("seed", range(RUNS or 24))
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "j.sqlite3"
    for again in range(2):
        told = killed(path if again == 0 else tmp_path / "k.sqlite3", seed + 1000 * again)
        recorded, failed = hold_to_it(path if again == 0 else tmp_path / "k.sqlite3", told)
        assert recorded
        assert not failed


@pytest.mark.parametrize(
    ("modes", "runs"),
    [("[1]", 8), ("[2]", 6), ("[1, 2, 3, 4]", 8), ("[4]", 4)],
    ids=["failing syncs", "no room", "all", "one failing sync"],
)
def test_what_failed_is_not_found_after_a_kill(
    tmp_path: Path, shim: Path, modes: str, runs: int
) -> None:
    failures = 0
    for seed in range(RUNS or runs):
        path = tmp_path / f"{seed}.sqlite3"
        failures += hold_to_it(path, killed(path, seed, shim, modes))[1]
    assert failures, "nothing was made to fail"


def test_a_kill_right_after_a_failed_sync_does_not_bring_the_turn_back(
    tmp_path: Path, shim: Path
) -> None:
    """The frames of that turn were written whole: only what lies over them keeps it away."""
    path = tmp_path / "j.sqlite3"
    code = """
import asyncio, ctypes, os, sys
from pathlib import Path
from journal_rig import opened, turn
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal

async def main():
    journal = SqliteJournal.connect(Path(sys.argv[1]))
    history = await opened(journal, "a")
    await turn(journal, history, "a", "kept")
    ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "fault_mode").value = 1
    try:
        await turn(journal, history, "a", "failed", size=5000)
    except JournalError as error:
        print(error, "|", journal.stats().broken, flush=True)
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "LD_PRELOAD": str(shim),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code, path, shim], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    told, _, broken = ran.stdout.strip().partition(" | ")
    assert "FSYNC" in told
    assert broken == told

    async def look(journal: SqliteJournal) -> None:
        history = await journal.load("a")
        assert [each.content for each in history.tip.messages] == ["kept", "tpek"]

    run(path, look)


def test_a_full_disk_fails_with_a_reason_and_heals_by_itself(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        history = await opened(journal, "a")
        fill(journal, 0)
        with pytest.raises(JournalError, match="no room left for the journal") as caught:
            await turn(journal, history, "a", os.urandom(200_000).hex())
        assert caught.value.full
        fill(journal, 100_000)
        await turn(journal, history, "a", "kept")
        assert journal.stats().broken is None
        assert (await journal.load("a")).tip.version == 1

    def fill(journal: SqliteJournal, more: int) -> None:
        (pages,) = journal._writer._db.execute("PRAGMA page_count").fetchone()
        journal._writer._db.execute(f"PRAGMA max_page_count = {pages + more}").fetchone()

    run(tmp_path / "j", use)


def test_concurrent_changes_share_transactions(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        histories = {f"s{n}": await opened(journal, f"s{n}") for n in range(40)}
        before = journal.stats()
        await asyncio.gather(*(turn(journal, h, name, "hi") for name, h in histories.items()))
        after = journal.stats()
        assert after.changes - before.changes == 40
        assert after.commits - before.commits <= 10
        assert after.waiting == 0

    run(tmp_path / "j", use)


def test_a_change_that_raises_fails_alone_in_its_batch(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        histories = {f"s{n}": await opened(journal, f"s{n}") for n in range(6)}
        await journal.end("s3", "closed")
        outcomes = await asyncio.gather(
            *(turn(journal, h, name, "hi") for name, h in histories.items()),
            return_exceptions=True,
        )
        assert [isinstance(each, JournalError) for each in outcomes] == [
            name == "s3" for name in histories
        ]
        for name in histories.keys() - {"s3"}:
            assert (await journal.load(name)).tip.version == 1

    run(tmp_path / "j", use)


def test_a_change_whose_caller_is_gone_is_recorded(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        history = await opened(journal, "a")
        leaving = asyncio.ensure_future(turn(journal, history, "a", "said"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        while journal.stats().waiting:
            await asyncio.sleep(0.001)
        assert (await journal.record("a")).version == 1

    run(tmp_path / "j", use)
