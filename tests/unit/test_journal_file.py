"""The journal's file: whose it is, who holds it, what is left of what was erased, damage."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from journal_rig import HEAD, TENANT, answer, opened, prepared, record_of, run, turn, user

from stateful_sglang.session.history import History
from stateful_sglang.session.journal import changes, files, maintenance, reading, schema
from stateful_sglang.session.journal.base import JournalError, SessionQuery
from stateful_sglang.session.journal.restoring import Restorer
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.records import KeyedResult, PrefixRecord, SessionOptions

HOLD = """
import sys, time
from pathlib import Path
from stateful_sglang.session.journal.sqlite import SqliteJournal
journal = SqliteJournal.connect(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


async def nothing(journal: SqliteJournal) -> None:
    """Open and close."""


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A journal of three sessions of ten turns, with a fork."""
    path = tmp_path / "folder" / "journal.sqlite3"

    async def fill(journal: SqliteJournal) -> None:
        for name in ("a", "b", "c"):
            history = await opened(journal, name)
            for number in range(10):
                await turn(journal, history, name, f"{name}{number} " + os.urandom(500).hex(), 500)
        fork = history.fork("d", 4)
        await journal.open(record_of(fork, "d"), fork)

    run(path, fill)
    return path


def test_its_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j"
    before = os.umask(0)
    try:

        async def look(journal: SqliteJournal) -> None:
            await opened(journal, "a")
            found = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
            assert found == dict.fromkeys(("j", "j-wal", "j-shm", "j.lock"), 0o600)
            assert path.parent.stat().st_mode & 0o777 == 0o700

        run(path, look)
    finally:
        os.umask(before)


def test_a_file_that_others_could_read_is_closed_to_them(filled: Path) -> None:
    filled.chmod(0o644)
    run(filled, nothing)
    assert filled.stat().st_mode & 0o777 == 0o600


def test_a_second_holder_is_refused_with_the_firsts_name_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(JournalError, match=rf"process {first.pid}, since \d{{4}}-.*--journal PATH"):
        SqliteJournal.connect(path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    run(path, nothing)


def test_one_process_holds_it_once(tmp_path: Path) -> None:
    async def again(journal: SqliteJournal) -> None:
        with pytest.raises(JournalError, match=f"process {os.getpid()}"):
            SqliteJournal.connect(tmp_path / "j")

    run(tmp_path / "j", again)
    run(tmp_path / "j", nothing)


def test_a_closed_journal_takes_nothing_and_closes_again(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        await journal.close()
        with pytest.raises(JournalError, match="closed"):
            await opened(journal, "a")
        with pytest.raises(JournalError, match="closed"):
            await journal.load("a")

    run(tmp_path / "j", use)


def test_what_was_erased_is_in_no_file_and_what_a_fork_needs_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    secrets = {name: f"secret-{name}-" + os.urandom(20).hex() for name in ("kept", "gone", "meta")}

    def found(text: str) -> bool:
        return any(text.encode() in file.read_bytes() for file in tmp_path.iterdir())

    async def use(journal: SqliteJournal) -> None:
        options = SessionOptions(metadata={"about": secrets["meta"]})
        history = await opened(journal, "a", options=options)
        for text in (secrets["kept"], secrets["gone"]):
            commit = prepared(history, range(9), [user(text)])
            kept = KeyedResult(TENANT, "a", text[:9], "d", {"text": text[:60]}, 1e12)
            record = record_of(history, "a", commit, options=options)
            await journal.append(record, commit, kept)
            history.publish(commit)
        long = prepared(history, range(90), [answer(secrets["gone"] + os.urandom(30_000).hex())])
        await journal.append(record_of(history, "a", long, options=options), long)
        fork = history.fork("b", 1)
        await journal.open(record_of(fork, "b"), fork)
        for number in range(20):
            await turn(journal, fork, "b", f"more {number}")
        (blob,) = await journal._read(
            lambda db: db.execute("SELECT messages FROM commits WHERE version = 3").fetchone()
        )
        part = blob[20_000:20_100]  # compressed, so looked for as it lies there
        assert all(found(secret) for secret in secrets.values())
        assert any(part in file.read_bytes() for file in tmp_path.iterdir())
        await journal.end("a", "closed", erase=True)
        assert found(secrets["kept"])
        assert not found(secrets["gone"])
        assert not found(secrets["meta"])
        assert not any(part in file.read_bytes() for file in tmp_path.iterdir())
        assert (await journal.load("b")).messages(1)[-1].content == secrets["kept"]
        await journal.end("b", "closed")
        await journal.end("a", "closed", erase=True)
        assert not found(secrets["kept"])

    run(path, use)


def test_closing_without_erasing_gives_the_room_to_others(tmp_path: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        sizes = []
        for number in range(6):
            history = await opened(journal, f"s{number}")
            await turn(journal, history, f"s{number}", os.urandom(200_000).hex())
            await journal.end(f"s{number}", "closed")
            sizes.append(journal._writer.counters.bytes)
        assert max(sizes[1:]) < 1.1 * sizes[0]

    run(tmp_path / "j", use)


def test_beyond_its_bound_sessions_are_refused_that_make_it_grow_until_one_is_closed(
    tmp_path: Path,
) -> None:
    path, bound = tmp_path / "j", 2_000_000

    async def use(journal: SqliteJournal) -> None:
        first = await opened(journal, "first")
        await turn(journal, first, "first", os.urandom(200_000).hex())
        history = await opened(journal, "a")

        async def grow() -> None:
            for _ in range(100):
                await turn(journal, history, "a", os.urandom(50_000).hex())

        with pytest.raises(JournalError, match="close sessions, or give it more") as caught:
            await grow()
        assert caught.value.full
        assert "as large as it may be" in (journal.stats().broken or "")
        assert history.newest > 3
        assert files.bytes_of(path) <= bound
        await journal.update(record_of(history, "a", used_at=5.0))
        assert (await journal.load("a")).tip.version == history.newest
        await journal.end("first", "closed")
        await turn(journal, history, "a", os.urandom(50_000).hex())
        assert journal.stats().broken is None

    run(path, use, max_bytes=bound)


def test_room_is_made_of_what_is_over_before_anything_is_refused(tmp_path: Path) -> None:
    now = 1e6

    async def use(journal: SqliteJournal) -> None:
        nonlocal now
        for number in range(12):
            await journal.keep(
                KeyedResult(TENANT, "", f"k{number}", "d", {"t": os.urandom(50_000).hex()}, now)
            )
        now += 24 * 3600 + 1
        history = await opened(journal, "a")
        for _ in range(12):
            await turn(journal, history, "a", os.urandom(20_000).hex())

    run(tmp_path / "j", use, max_bytes=1_500_000, clock=lambda: now)


def test_records_of_ended_sessions_are_forgotten_after_a_month(tmp_path: Path) -> None:
    now = 1000.0

    async def use(journal: SqliteJournal) -> None:
        await opened(journal, "a")
        await opened(journal, "b")
        await journal.end("a", "expired")
        db = journal._writer._db
        changes.purge(db, now + changes.TOMBSTONES_KEPT_S - 1)
        assert (await journal.record("a")).state == "expired"
        changes.purge(db, now + changes.TOMBSTONES_KEPT_S)
        assert await journal.record("a") is None
        assert (await journal.record("b")).state == "open"

    run(tmp_path / "j", use, clock=lambda: now)


def test_a_file_of_a_later_release_is_refused_and_left_alone(filled: Path) -> None:
    db = sqlite3.connect(filled)
    db.execute("PRAGMA user_version = 999")
    db.close()
    before = filled.read_bytes()
    with pytest.raises(JournalError, match=r"schema version 999 and this release knows \d"):
        SqliteJournal.connect(filled)
    assert filled.read_bytes() == before


def test_an_older_file_is_brought_up_to_date_step_by_step_or_not_at_all(tmp_path: Path) -> None:
    steps = [
        ("CREATE TABLE t (x)", "INSERT INTO t VALUES (1)"),
        ("ALTER TABLE t ADD COLUMN y", "UPDATE t SET y = x + 1"),
        ("CREATE INDEX t_y ON t (y)",),
    ]
    db = sqlite3.connect(tmp_path / "j", isolation_level=None)
    schema.migrate(db, steps[:1])
    broken = [*steps[:2], ("INSERT INTO t VALUES (5, 6)", "INSERT INTO missing VALUES (1)")]
    with pytest.raises(sqlite3.OperationalError, match="missing"):
        schema.migrate(db, broken)
    assert schema.version_of(db) == 2
    assert db.execute("SELECT * FROM t").fetchall() == [(1, 2)]
    schema.migrate(db, steps)
    schema.migrate(db, steps)
    assert schema.version_of(db) == 3
    with pytest.raises(schema.NewerSchemaError):
        schema.migrate(db, steps[:2])
    db.close()


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "j")
    db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(JournalError, match="another program"):
        SqliteJournal.connect(tmp_path / "j")


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"no database at all".ljust(len(data)),
        lambda data: data[: len(data) // 2],
        lambda data: data[:100] + b"\xff" * 8000 + data[8100:],
    ],
    ids=["another file", "cut off", "overwritten"],
)
def test_a_damaged_file_is_refused_with_its_name_and_what_to_run(filled: Path, harm) -> None:
    filled.write_bytes(harm(filled.read_bytes()))
    expected = re.escape(str(filled)) + ".*stateful-sglang journal check"
    with pytest.raises(JournalError, match=expected):
        SqliteJournal.connect(filled)
    filled.unlink()
    run(filled, nothing)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE commits SET messages = x'00ff' WHERE owner = 'a' AND version = 5",
        "UPDATE commits SET tokens = x'0178' WHERE owner = 'a' AND version = 5",
        "UPDATE commits SET tokens = x'05' WHERE owner = 'a' AND version = 5",
        "UPDATE commits SET base_len = 1000000 WHERE owner = 'a' AND version = 5",
        "DELETE FROM commits WHERE owner = 'a' AND version = 5",
        "UPDATE sessions SET version = 77 WHERE id = 'a'",
    ],
)
def test_a_damaged_session_is_an_error_of_its_own(filled: Path, statement: str) -> None:
    db = sqlite3.connect(filled)
    assert db.execute(statement).rowcount == 1
    db.commit()
    db.close()

    async def use(journal: SqliteJournal) -> None:
        with pytest.raises(JournalError, match=r"is damaged: .*journal check"):
            await journal.load("a")
        for name in ("b", "c", "d"):
            history = await journal.load(name)
            await turn(journal, history, name, "goes on")
        assert (await journal.list(SessionQuery(TENANT))).total == 4

    run(filled, use)


def test_a_page_that_went_bad_fails_what_lies_on_it_alone(filled: Path) -> None:
    db = sqlite3.connect(filled)
    (size,) = db.execute("PRAGMA page_size").fetchone()
    try:
        (page,) = db.execute(
            "SELECT pageno FROM dbstat WHERE name = 'commits' AND pagetype = 'leaf'"
            " ORDER BY path LIMIT 1"
        ).fetchone()
    except sqlite3.OperationalError:
        pytest.skip("this SQLite tells nothing of its pages: built without dbstat")
    db.close()
    data = bytearray(filled.read_bytes())
    data[(page - 1) * size : page * size] = b"\xee" * size
    filled.write_bytes(data)

    async def use(journal: SqliteJournal) -> None:
        with pytest.raises(JournalError, match="is damaged"):
            await journal.load("a")
        assert (await journal.load("c")).tip.version == 10
        await opened(journal, "new")

    run(filled, use)


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"cannot be opened.*--journal off"):
        SqliteJournal.connect(tmp_path / "file" / "j")


def test_a_new_file_is_in_wal_mode_and_can_be_shrunk_while_it_is_used(filled: Path) -> None:
    db = sqlite3.connect(filled)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert db.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION_ID,)
    db.close()


@pytest.mark.parametrize(("sync", "level"), [("full", 2), ("normal", 1)])
def test_how_hard_it_syncs_is_as_it_was_told(tmp_path: Path, sync, level: int) -> None:
    async def use(journal: SqliteJournal) -> None:
        assert journal._writer._db.execute("PRAGMA synchronous").fetchone() == (level,)

    run(tmp_path / "j", use, sync=sync)


def test_what_a_tenant_has_open_is_counted_as_it_changes_and_in_files_of_older_releases(
    tmp_path: Path,
) -> None:
    async def use(journal: SqliteJournal) -> list[tuple[int, int]]:
        seen = []
        for session_id, tenant in (("a", "one"), ("b", "one"), ("c", "two")):
            history = await opened(journal, session_id, tenant=tenant)
            commit = prepared(history, range(10), [user("hello")])
            await journal.append(record_of(history, session_id, commit, tenant=tenant), commit)
            history.publish(commit)
        seen.append(await journal.totals("one"))
        back = record_of(history, "c", history.at(0), tenant="two")
        await journal.update(back)
        await journal.end("b", "closed")
        await journal.end("b", "closed")
        seen += [await journal.totals("one"), await journal.totals("two")]
        seen.append(await journal.totals("nobody"))
        return seen

    path = tmp_path / "j"
    assert run(path, use) == [(2, 20), (1, 10), (1, 0), (0, 0)]

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        undo_totals(db)

    async def look(journal: SqliteJournal) -> tuple[object, object, int]:
        stats = journal.stats()
        return await journal.totals("one"), await journal.totals("two"), stats.sessions

    assert run(path, look) == ((1, 10), (1, 0), 2)


def test_a_file_from_before_conversations_could_be_found_takes_them(filled: Path) -> None:
    with contextlib.closing(sqlite3.connect(filled, isolation_level=None)) as db:
        undo_said(db)

    async def use(journal: SqliteJournal) -> dict[bytes, tuple[str, int]]:
        assert await journal.said([b"one"]) == {}
        history = await opened(journal, "said")
        commit = history.prepare(
            base_len=0,
            tokens=range(3),
            head=history.tip.conversation.head,
            messages=[user("hello")],
            said=b"one",
        )
        await journal.append(record_of(history, "said", commit), commit)
        return dict(await journal.said([b"none", b"one"]))

    assert run(filled, use) == {b"one": ("said", 1)}

    async def look(journal: SqliteJournal) -> tuple[bytes | None, dict[bytes, tuple[str, int]]]:
        history = await journal.load("said")
        assert history is not None
        await journal.end("said", "closed")
        return history.tip.said, dict(await journal.said([b"one"]))

    assert run(filled, look) == (b"one", {})


async def prefix_ids(journal: SqliteJournal) -> list[str]:
    return [each.id for each in await journal.prefixes()]


def test_published_prefixes_outlive_the_process_in_their_order(tmp_path: Path) -> None:
    made = [
        PrefixRecord(name, label, "m", array("q", range(start, start + 300)), 1000.5)
        for name, label, start in (("z", None, 0), ("a", "tools \udc80", 70_000), ("m", "x", 5))
    ]

    async def use(journal: SqliteJournal) -> None:
        for each in made:
            await journal.publish(each)
        await journal.unpublish("m")
        await journal.unpublish("never was")

    async def look(journal: SqliteJournal) -> list[PrefixRecord]:
        return list(await journal.prefixes())

    run(tmp_path / "j", use)
    assert run(tmp_path / "j", look) == made[:2]


def test_a_file_from_before_there_were_prefixes_takes_them(filled: Path) -> None:
    with contextlib.closing(sqlite3.connect(filled, isolation_level=None)) as db:
        undo_prefixes(db)

    async def use(journal: SqliteJournal) -> list[str]:
        assert await prefix_ids(journal) == []
        await journal.publish(PrefixRecord("p", None, "m", array("q", [1, 2]), 1.0))
        assert (await journal.list(SessionQuery(TENANT))).total == 4
        return await prefix_ids(journal)

    assert run(filled, use) == ["p"]


def test_a_damaged_prefix_is_left_out_and_a_check_names_it(filled: Path) -> None:
    async def use(journal: SqliteJournal) -> None:
        for name in ("p", "q"):
            await journal.publish(PrefixRecord(name, None, "m", array("q", [1, 2]), 1.0))

    run(filled, use)
    with contextlib.closing(sqlite3.connect(filled, isolation_level=None)) as db:
        db.execute("UPDATE prefixes SET tokens = x'05' WHERE id = 'p'")
    assert run(filled, prefix_ids) == ["q"]
    report = maintenance.check(filled)
    assert report.facts["published prefixes"] == 2
    (problem,) = report.problems
    assert "published prefix p" in problem


@pytest.mark.parametrize("query", ["open_count", "totals", "idle"])
def test_what_is_asked_with_every_turn_looks_at_no_session_that_it_is_not_about(
    filled: Path, query: str
) -> None:
    asked = {
        "open_count": lambda db: reading.open_count(db),
        "totals": lambda db: reading.totals(db, "default"),
        "idle": lambda db: reading.idle(db, 5.0, 3.0, 10),
    }[query]
    with contextlib.closing(sqlite3.connect(filled)) as db:
        statements: list[str] = []
        db.set_trace_callback(statements.append)
        asked(db)
        db.set_trace_callback(None)
        plan = [row[-1] for row in db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    assert plan
    assert not [step for step in plan if step.startswith("SCAN sessions")], plan


def undo_said(db: sqlite3.Connection) -> None:
    """Make a file what the release before conversations could be found left."""
    db.execute("DROP INDEX commits_said")
    db.execute("ALTER TABLE commits DROP COLUMN said")
    db.execute("PRAGMA user_version = 3")


def undo_prefixes(db: sqlite3.Connection) -> None:
    """Make a file what the release before prefixes left."""
    undo_said(db)
    db.execute("DROP TABLE prefixes")
    db.execute("PRAGMA user_version = 2")


def undo_totals(db: sqlite3.Connection) -> None:
    """Make a file what the release before the table of totals left."""
    undo_prefixes(db)
    for trigger in ("session_opened", "session_grown", "session_ended"):
        db.execute(f"DROP TRIGGER {trigger}")
    for index in ("sessions_used", "sessions_lasting", "sessions_due"):
        db.execute(f"DROP INDEX {index}")
    db.execute("DROP TABLE totals")
    db.execute("CREATE INDEX sessions_used ON sessions (tenant, used_at)")
    db.execute("CREATE INDEX sessions_open ON sessions (used_at) WHERE state = 'open'")
    db.execute("PRAGMA user_version = 1")


def test_a_long_history_is_made_in_steps_between_which_others_may_be_made(tmp_path: Path) -> None:
    turns = 900
    path = tmp_path / "j"

    async def fill(journal: SqliteJournal) -> list[int]:
        history = History.opened("long", HEAD)
        for number in range(turns):
            history.publish(prepared(history, [number, number + 1], [user(str(number))]))
        await journal.open(record_of(history, "long"), history)
        fork = history.fork("fork", turns - 1)
        await journal.open(record_of(fork, "fork"), fork)
        return list(history.tip.transcript)

    tokens = run(path, fill)
    with contextlib.closing(sqlite3.connect(path)) as db:
        stored = [reading.stored_history(db, name) for name in ("long", "fork")]
    restorer = Restorer()
    making = [restorer.steps(each) for each in stored if each is not None]
    made: dict[int, History] = {}
    steps = 0
    while len(made) < len(making):
        for number, each in enumerate(making):
            try:
                if number not in made:
                    next(each)
                    steps += 1
            except StopIteration as end:
                made[number] = end.value
    assert steps >= 2 * 3
    long, fork = made[0], made[1]
    assert list(long.tip.transcript) == tokens
    assert list(fork.tip.transcript) == tokens[:-2]
    assert fork.tip is long.at(turns - 1), "what both have is one object"
