"""What each change does to the tables. All run in the writer's thread, inside its transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.journal import codec, rows
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.messages import Head
from stateful_sglang.session.records import (
    KEYS_KEPT_S,
    KeyedResult,
    PrefixRecord,
    SessionRecord,
    State,
)

TOMBSTONES_KEPT_S = 30 * 24 * 3600
"""Seconds that the record of a session which ended is kept."""


def open_session(
    db: sqlite3.Connection, record: SessionRecord, history: History, keyed: KeyedResult | None
) -> None:
    """Add a session with the commits of its history that are its own.

    Raises:
        JournalError: It continues a commit that is not recorded.
    """
    for commit in _own(record.id, history):
        _add(db, commit)
    origin = history.origin
    found = _commit_id(db, origin)
    if found is None:
        raise _unrecorded(origin)
    columns = {**rows.values(record), "origin": found}
    names = ", ".join(columns)
    marks = ", ".join(f":{name}" for name in columns)
    db.execute(f"INSERT INTO sessions ({names}) VALUES ({marks})", columns)
    if keyed is not None:
        keep(db, keyed)


def append(
    db: sqlite3.Connection, record: SessionRecord, commit: Commit, keyed: KeyedResult | None
) -> None:
    """Add a commit, and take its session to it.

    Raises:
        JournalError: Its parent is not recorded, or its session not open.
    """
    _add(db, commit)
    update(db, record, keyed)


def update(db: sqlite3.Connection, record: SessionRecord, keyed: KeyedResult | None) -> None:
    """Write the record of an open session.

    Raises:
        JournalError: There is none.
    """
    columns = rows.values(record)
    pairs = ", ".join(f"{name} = :{name}" for name in columns if name != "id")
    changed = db.execute(
        f"UPDATE sessions SET {pairs} WHERE id = :id AND state = 'open'", columns
    ).rowcount
    if changed != 1:
        raise JournalError("the journal has no open session of that id; it ended, or never was")
    if keyed is not None:
        keep(db, keyed)


def keep(db: sqlite3.Connection, keyed: KeyedResult) -> None:
    """Write a keyed result."""
    db.execute(
        f"INSERT OR REPLACE INTO results ({rows.KEYED_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
        rows.keyed_values(keyed),
    )


def end(db: sqlite3.Connection, session_id: str, state: State, now: float, erase: bool) -> None:
    """Leave of a session its record, and the commits that open sessions reach.

    A session that ended already stays as it is, and can be erased still.

    Raises:
        JournalError: There never was one, or it was forgotten.
    """
    name = codec.name(session_id)
    row = db.execute("SELECT origin FROM sessions WHERE id = ?", (name,)).fetchone()
    if row is None:
        raise JournalError("the journal has no session of that id")
    db.execute(
        "UPDATE sessions SET origin = NULL, state = ?, ended_at = ?"
        " WHERE id = ? AND state = 'open'",
        (state, now, name),
    )
    if erase:
        db.execute(
            "UPDATE sessions SET metadata = ?, tools = ? WHERE id = ?",
            (codec.dump({}), codec.dump([]), name),
        )
    db.execute("DELETE FROM results WHERE scope = ?", (name,))
    heads: set[int] = set()
    # Children have greater ids than their parents, so this goes from the leaves to the root.
    own = db.execute("SELECT id FROM commits WHERE owner = ? ORDER BY id DESC", (name,)).fetchall()
    for (commit,) in own:
        _drop(db, commit, heads)
    above = row[0]
    while above is not None:
        above = _drop(db, above, heads)
    for head in heads:
        db.execute(
            "DELETE FROM heads WHERE id = ?1 AND NOT EXISTS"
            " (SELECT 1 FROM commits WHERE head = ?1)",
            (head,),
        )


def publish(db: sqlite3.Connection, prefix: PrefixRecord) -> None:
    """Add a published prefix behind the others."""
    marks = ", ".join("?" for _ in rows.PREFIX_COLUMNS.split(","))
    db.execute(
        f"INSERT INTO prefixes ({rows.PREFIX_COLUMNS}) VALUES ({marks})", rows.prefix_values(prefix)
    )


def unpublish(db: sqlite3.Connection, prefix_id: str) -> None:
    """Drop a published prefix, if there is one of this id."""
    db.execute("DELETE FROM prefixes WHERE id = ?", (codec.name(prefix_id),))


def purge(db: sqlite3.Connection, now: float, *, all_tombstones: bool = False) -> int:
    """Forget results and records whose time is over; how many rows those were.

    Args:
        all_tombstones: Forget every record of a session that ended.
    """
    gone = db.execute("DELETE FROM results WHERE created_at < ?", (now - KEYS_KEPT_S,)).rowcount
    before = now if all_tombstones else now - TOMBSTONES_KEPT_S
    gone += db.execute(
        "DELETE FROM sessions WHERE state <> 'open' AND ended_at <= ?", (before,)
    ).rowcount
    return gone


def used_bytes(db: sqlite3.Connection) -> int:
    """Bytes of the database's pages that hold something, as the open transaction leaves it."""
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def _own(owner: str, history: History) -> Iterator[Commit]:
    """A session's own commits, parents before children."""
    above: list[Commit] = []
    commit: Commit | None = history.origin
    while commit is not None and commit.owner == owner:
        above.append(commit)
        commit = commit.parent
    yield from reversed(above)
    yield from history.published


def _add(db: sqlite3.Connection, commit: Commit) -> None:
    parent = None
    if commit.parent is not None:
        parent = _commit_id(db, commit.parent)
        if parent is None:
            raise _unrecorded(commit.parent)
    db.execute(
        "INSERT INTO commits (parent, owner, version, base_len, tokens, messages, raw, head,"
        " pending, finish_reason, created_at, said) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            parent,
            codec.name(commit.owner),
            commit.version,
            commit.base_len,
            codec.dump_tokens(commit.tokens),
            codec.dump_messages(commit.messages),
            int(commit.conversation.raw),
            _head_id(db, commit.conversation.head),
            codec.dump_messages(commit.pending),
            commit.finish_reason,
            commit.created_at,
            commit.said,
        ),
    )


def _head_id(db: sqlite3.Connection, head: Head) -> int:
    found = db.execute("SELECT id FROM heads WHERE key = ?", (head.key,)).fetchone()
    if found is None:
        found = db.execute(
            "INSERT INTO heads (key, body) VALUES (?, ?) RETURNING id",
            (head.key, codec.dump_head(head)),
        ).fetchone()
    return int(found[0])


def _commit_id(db: sqlite3.Connection, commit: Commit) -> int | None:
    row = db.execute(
        "SELECT id FROM commits WHERE owner = ? AND version = ?",
        (codec.name(commit.owner), commit.version),
    ).fetchone()
    return None if row is None else int(row[0])


def _drop(db: sqlite3.Connection, commit: int, heads: set[int]) -> int | None:
    """Delete a commit that no open session needs; the commit above it, or None where it stays."""
    row = db.execute(
        "SELECT parent, head FROM commits WHERE id = ?1"
        " AND NOT EXISTS (SELECT 1 FROM commits AS child WHERE child.parent = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM sessions WHERE origin = ?1)"
        " AND NOT EXISTS"
        " (SELECT 1 FROM sessions WHERE sessions.id = commits.owner AND state = 'open')",
        (commit,),
    ).fetchone()
    if row is None:
        return None
    db.execute("DELETE FROM commits WHERE id = ?", (commit,))
    heads.add(row[1])
    return None if row[0] is None else int(row[0])


def _unrecorded(commit: Commit) -> JournalError:
    return JournalError(
        f"version {commit.version}, which this continues, is not in the journal: its session ended"
    )
