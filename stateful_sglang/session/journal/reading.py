"""What is asked of a journal. All run beside the event loop; nothing here makes a `Commit`."""

from __future__ import annotations

import logging
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stateful_sglang.session.journal import codec, rows
from stateful_sglang.session.journal.base import SessionPage, SessionQuery, TenantTotals
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import (
    KEYS_KEPT_S,
    KeyedResult,
    PrefixRecord,
    SessionRecord,
)

logger = logging.getLogger(__name__)


class StoredCommit(NamedTuple):
    """A commit as its row has it."""

    id: int
    parent: int | None
    owner: str
    version: int
    base_len: int
    tokens: array[int]
    messages: tuple[Message, ...]
    raw: bool
    head: str
    """Key of its head."""
    pending: tuple[Message, ...]
    finish_reason: str | None
    created_at: float
    said: bytes | None


class StoredHistory(NamedTuple):
    """All that an open session's history is made of again."""

    owner: str
    origin: int
    """Id of the commit it begins with."""
    version: int
    newest: int
    commits: list[StoredCommit]
    """Its own, and those on the way to them; parents before children."""
    heads: dict[str, Head]
    """By key."""


def record(db: sqlite3.Connection, session_id: str) -> SessionRecord | None:
    """A session's record, in any state."""
    row = db.execute(
        f"SELECT {rows.COLUMNS} FROM sessions WHERE id = ?", (codec.name(session_id),)
    ).fetchone()
    return None if row is None else rows.record(row)


def result(
    db: sqlite3.Connection, tenant: str, scope: str, key: str, now: float
) -> KeyedResult | None:
    """The result under a key whose time is not over."""
    names = (codec.name(tenant), codec.name(scope), codec.name(key))
    row = db.execute(
        f"SELECT {rows.KEYED_COLUMNS} FROM results"
        " WHERE tenant = ? AND scope = ? AND key = ? AND created_at >= ?",
        (*names, now - KEYS_KEPT_S),
    ).fetchone()
    return None if row is None else rows.keyed_result(row)


def stored_history(db: sqlite3.Connection, session_id: str) -> StoredHistory | None:
    """The rows of an open session's history; None where there is no such session.

    Raises:
        DamagedError: What is there makes up no history.
        sqlite3.Error: The file is damaged where it lies.
    """
    name = codec.name(session_id)
    session = db.execute(
        "SELECT origin, version, newest FROM sessions WHERE id = ? AND state = 'open'", (name,)
    ).fetchone()
    if session is None:
        return None
    origin, version, newest = session
    found = db.execute(
        "WITH RECURSIVE needed (id) AS ("
        " SELECT id FROM commits WHERE owner = ?1 UNION SELECT ?2"
        " UNION SELECT commits.parent FROM commits JOIN needed USING (id)"
        " WHERE commits.parent IS NOT NULL)"
        " SELECT commits.id, parent, owner, version, base_len, tokens, messages, raw, heads.key,"
        " pending, finish_reason, commits.created_at, said, heads.id"
        " FROM needed JOIN commits ON commits.id = needed.id LEFT JOIN heads ON heads.id = head"
        " ORDER BY commits.id",
        (name, origin),
    ).fetchall()
    heads: dict[str, Head] = {}
    for key, number in {(row[8], row[13]) for row in found}:
        body = db.execute("SELECT body FROM heads WHERE id = ?", (number,)).fetchone()
        if body is None:
            raise codec.DamagedError("a commit's head is missing")
        heads[key] = codec.parse_head(body[0])
    commits = [_commit(row) for row in found]
    return StoredHistory(session_id, origin, version, newest, commits, heads)


def said(db: sqlite3.Connection, digests: Sequence[bytes]) -> dict[bytes, tuple[str, int]]:
    """Sessions and versions at which all was said that these digests are of, by digest."""
    marks = ", ".join("?" * len(digests))
    found = db.execute(f"SELECT said, owner, version FROM commits WHERE said IN ({marks})", digests)
    return {digest: (codec.from_name(owner), version) for digest, owner, version in found}


def sessions(db: sqlite3.Connection, query: SessionQuery) -> SessionPage:
    """A page of a tenant's sessions, the last used first."""
    where, given = "tenant = :tenant", {"tenant": codec.name(query.tenant), "state": query.state}
    if query.state is not None:
        where += " AND state = :state"
    if query.metadata:
        db.create_function("has_metadata", 1, _matcher(query.metadata), deterministic=True)
        where += " AND has_metadata(metadata)"
    if query.state == "open" and not query.metadata:
        total = totals(db, query.tenant).sessions
    else:
        (total,) = db.execute(f"SELECT count(*) FROM sessions WHERE {where}", given).fetchone()
    if query.after is not None:
        where += (
            " AND (used_at, id) < (SELECT used_at, id FROM sessions"
            " WHERE id = :after AND tenant = :tenant)"
        )
    found = db.execute(
        f"SELECT {rows.COLUMNS} FROM sessions WHERE {where}"
        " ORDER BY used_at DESC, id DESC LIMIT :limit",
        {
            **given,
            "after": None if query.after is None else codec.name(query.after),
            "limit": max(0, query.limit),
        },
    )
    return SessionPage(list(_sound(found)), total)


def totals(db: sqlite3.Connection, tenant: str) -> TenantTotals:
    """What a tenant's open sessions hold."""
    found = db.execute(
        "SELECT sessions, tokens FROM totals WHERE tenant = ?", (codec.name(tenant),)
    ).fetchone()
    return TenantTotals(0, 0) if found is None else TenantTotals(*found)


def idle(
    db: sqlite3.Connection, before: float, default_ttl_s: float | None, limit: int
) -> list[str]:
    """Open sessions whose time to live has ended, the longest idle first."""
    found = db.execute(
        "SELECT id FROM ("
        "SELECT id, used_at FROM sessions"
        " WHERE state = 'open' AND ttl_s IS NOT NULL AND used_at + ttl_s <= ?1 UNION ALL "
        "SELECT id, used_at FROM sessions"
        " WHERE state = 'open' AND ttl_s IS NULL AND used_at <= ?1 - ?2)"
        " ORDER BY used_at LIMIT ?3",
        (before, default_ttl_s, limit),
    )
    return [codec.from_name(id_) for (id_,) in found]


def oldest(db: sqlite3.Connection, tenant: str, limit: int) -> list[str]:
    """A tenant's open sessions, the longest idle first."""
    found = db.execute(
        "SELECT id FROM sessions WHERE tenant = ? AND state = 'open' ORDER BY used_at LIMIT ?",
        (codec.name(tenant), limit),
    )
    return [codec.from_name(id_) for (id_,) in found]


def prefixes(db: sqlite3.Connection) -> list[PrefixRecord]:
    """What is published, the oldest first, without what is damaged."""
    found = []
    for row in db.execute(f"SELECT {rows.PREFIX_COLUMNS} FROM prefixes ORDER BY number"):
        try:
            found.append(rows.prefix(row))
        except codec.DamagedError as error:
            logger.error("published prefix %s is published no longer: %s", row[0], error)
    return found


def open_count(db: sqlite3.Connection) -> int:
    """How many sessions are open, in time proportional to how many tenants have any."""
    (count,) = db.execute("SELECT total(sessions) FROM totals").fetchone()
    return int(count)


def _commit(row: tuple[Any, ...]) -> StoredCommit:
    id_, parent, owner, version, base_len, tokens, messages, raw, head, *rest = row
    pending, finish, at, said, _ = rest
    return StoredCommit(
        id_,
        parent,
        codec.from_name(owner),
        version,
        base_len,
        codec.parse_tokens(tokens),
        codec.parse_messages(messages),
        bool(raw),
        head,
        codec.parse_messages(pending),
        finish,
        at,
        said,
    )


def _sound(found: Iterable[tuple[Any, ...]]) -> Iterator[SessionRecord]:
    """The records in rows; a damaged one keeps nobody from the others."""
    for row in found:
        try:
            yield rows.record(row)
        except codec.DamagedError as error:
            logger.error("a session's record is left out of a list: %s", error)


def _matcher(pairs: dict[str, str]) -> Callable[[bytes], bool]:
    def matches(blob: bytes) -> bool:
        try:
            return pairs.items() <= rows.metadata_of(blob).items()
        except codec.DamagedError:
            return False

    return matches
