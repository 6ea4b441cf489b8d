"""Whatever moment of a change a process is killed at: what it answered is there, and nothing twice.

Processes are forked for it from one that has no other threads, and stood before the disk by a
preloaded library: that one is a program of its own, run here as the bench of recovery runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import commit_points
import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("RECOVERY_KILLS", "0")) or 4 * len(commit_points.POINTS)
DISK_RUNS = int(os.environ.get("RECOVERY_DISK_RUNS", "3"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and preloads a library")


def measured(folder: Path, *arguments: str, before: str = "") -> dict[str, Any]:
    """What the program told; `before` is run in it first, to break what it looks at."""
    file = folder / "told.json"
    code = f"{before}\nimport sys, runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    program = str(HERE / "recovery_runs.py")
    command = ["-c", f"import sys\nsys.argv = sys.argv[1:]\n{code}", program, *arguments]
    subprocess.run(
        [sys.executable, *command, "--json", str(file)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    return json.loads(file.read_text())


def test_a_kill_at_any_point_of_a_change_loses_nothing_and_does_nothing_twice(
    tmp_path: Path,
) -> None:
    told = measured(tmp_path, "--kills", str(KILLS), "--disk-runs", "0")
    figures = told["figures"]
    assert figures["point_kills"] == KILLS
    assert figures["point_published"] > KILLS
    assert (figures["point_lost"], figures["point_duplicated"], figures["point_wrong"]) == (
        0,
        0,
        0,
    ), told["notes"]
    assert len(told["points"]) >= len(commit_points.POINTS) - len(commit_points.AT_THE_DISK)


def test_a_failing_disk_is_told_as_507_and_what_was_refused_is_not_found(tmp_path: Path) -> None:
    told = measured(tmp_path, "--kills", "0", "--disk-runs", str(DISK_RUNS))
    figures = told["figures"]
    if not figures["disk_runs"]:
        pytest.skip("a library to preload needs a C compiler")
    assert figures["disk_refused"], "nothing was made to fail"
    assert figures["disk_published"]
    wrong = [figures[f"disk_{kind}"] for kind in ("lost", "refused_found", "unserved")]
    assert wrong == [0, 0, 0], told["notes"]


@pytest.mark.parametrize(
    ("kind", "point", "fault"),
    [
        (
            "lost",
            "answered",
            # Answered before it is recorded.
            "async def change(self, run, *, change=SqliteJournal._change, **options):\n"
            "    async def later():\n"
            "        await asyncio.sleep(0.05)\n"
            "        await change(self, run, **options)\n"
            "    asyncio.ensure_future(later())\n"
            "SqliteJournal._change = change\n",
        ),
        (
            "duplicated",
            "before the answer",
            # Keys are not looked up.
            "async def result(self, *key): return None\nSqliteJournal.result = result\n",
        ),
    ],
    ids=["answered before it is recorded", "keys not looked up"],
)
def test_a_journal_with_a_fault_is_found_out(
    tmp_path: Path, kind: str, point: str, fault: str
) -> None:
    before = (
        f"import asyncio\nfrom stateful_sglang.session.journal.sqlite import SqliteJournal\n{fault}"
    )
    told = measured(
        tmp_path, *("--kills", "10", "--point", point, "--disk-runs", "0"), before=before
    )
    assert told["figures"][f"point_{kind}"] > 0, told["notes"]
