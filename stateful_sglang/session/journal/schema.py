"""The tables of a journal, and how a file of an older release becomes one of this release."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

APPLICATION_ID = 0x5353474A
"""In the file's header: "SSGJ", which tells a journal from other databases."""

Step = Sequence[str]
"""Statements that bring a file from one schema version to the next, in one transaction."""

FIRST: Step = (
    # The number of the last batch of changes: tells whether a commit that raised is in the file.
    # `dropped` only ever changes so that something is written in the place of one that is not.
    "CREATE TABLE batches (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL,"
    " dropped INTEGER NOT NULL)",
    "INSERT INTO batches VALUES (1, 0, 0)",
    "CREATE TABLE heads (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, body BLOB NOT NULL)",
    "CREATE TABLE commits (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES commits (id),"
    " owner NOT NULL, version INTEGER NOT NULL, base_len INTEGER NOT NULL, tokens BLOB NOT NULL,"
    " messages BLOB NOT NULL, raw INTEGER NOT NULL, head INTEGER NOT NULL REFERENCES heads (id),"
    " pending BLOB NOT NULL, finish_reason, created_at REAL NOT NULL, UNIQUE (owner, version))",
    "CREATE INDEX commits_parent ON commits (parent)",
    "CREATE INDEX commits_head ON commits (head)",
    "CREATE TABLE sessions (id PRIMARY KEY NOT NULL, tenant NOT NULL, model NOT NULL,"
    " state TEXT NOT NULL, created_at REAL NOT NULL, used_at REAL NOT NULL, ended_at REAL,"
    " version INTEGER NOT NULL, newest INTEGER NOT NULL, tokens INTEGER NOT NULL,"
    " messages INTEGER NOT NULL, pending INTEGER NOT NULL, tools BLOB NOT NULL, finish_reason,"
    " origin_owner, origin_version INTEGER, origin INTEGER REFERENCES commits (id),"
    " metadata BLOB NOT NULL, ttl_s REAL, retention TEXT NOT NULL, priority INTEGER NOT NULL,"
    " private INTEGER NOT NULL"
    ") WITHOUT ROWID",
    "CREATE INDEX sessions_used ON sessions (tenant, used_at)",
    "CREATE INDEX sessions_open ON sessions (used_at) WHERE state = 'open'",
    "CREATE INDEX sessions_ended ON sessions (ended_at) WHERE state <> 'open'",
    "CREATE INDEX sessions_origin ON sessions (origin) WHERE origin IS NOT NULL",
    "CREATE TABLE results (tenant NOT NULL, scope NOT NULL, key NOT NULL, digest NOT NULL,"
    " result BLOB NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (tenant, scope, key))",
    "CREATE INDEX results_scope ON results (scope)",
    "CREATE INDEX results_age ON results (created_at)",
)
TOTALS: Step = (
    # What each tenant has open, kept by the changes themselves: counting it anew would take a step
    # for every session with every turn that is recorded.
    "CREATE TABLE totals (tenant PRIMARY KEY NOT NULL, sessions INTEGER NOT NULL,"
    " tokens INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO totals SELECT tenant, count(*), sum(tokens) FROM sessions WHERE state = 'open'"
    " GROUP BY tenant",
    "CREATE TRIGGER session_opened AFTER INSERT ON sessions WHEN new.state = 'open' BEGIN"
    " INSERT INTO totals VALUES (new.tenant, 1, new.tokens) ON CONFLICT (tenant) DO UPDATE"
    " SET sessions = sessions + 1, tokens = tokens + new.tokens; END",
    "CREATE TRIGGER session_grown AFTER UPDATE OF tokens ON sessions"
    " WHEN new.state = 'open' AND new.tokens <> old.tokens BEGIN"
    " UPDATE totals SET tokens = tokens + new.tokens - old.tokens WHERE tenant = new.tenant; END",
    "CREATE TRIGGER session_ended AFTER UPDATE OF state ON sessions"
    " WHEN old.state = 'open' AND new.state <> 'open' BEGIN"
    " UPDATE totals SET sessions = sessions - 1, tokens = tokens - old.tokens"
    " WHERE tenant = old.tenant;"
    " DELETE FROM totals WHERE tenant = old.tenant AND sessions = 0; END",
    # Counting a tenant's sessions of any state takes no look at each one's row.
    "DROP INDEX sessions_used",
    "CREATE INDEX sessions_used ON sessions (tenant, used_at, state)",
    # Those whose time is over are found without a look at those that have some left.
    "DROP INDEX sessions_open",
    "CREATE INDEX sessions_lasting ON sessions (used_at) WHERE state = 'open' AND ttl_s IS NULL",
    "CREATE INDEX sessions_due ON sessions (used_at + ttl_s)"
    " WHERE state = 'open' AND ttl_s IS NOT NULL",
)
PREFIXES: Step = (
    # In the order in which they were published, which decides for which of them there is room.
    "CREATE TABLE prefixes (number INTEGER PRIMARY KEY, id NOT NULL UNIQUE, name, model NOT NULL,"
    " tokens BLOB NOT NULL, created_at REAL NOT NULL)",
)
SAID: Step = (
    # Digests of what was said, by which conversations are found that are sent whole.
    "ALTER TABLE commits ADD COLUMN said",
    "CREATE INDEX commits_said ON commits (said) WHERE said IS NOT NULL",
)
MIGRATIONS: tuple[Step, ...] = (FIRST, TOTALS, PREFIXES, SAID)
"""Step n brings a file of schema version n to n + 1; one that was released never changes."""


class NewerSchemaError(Exception):
    """The file was written by a later release."""


def migrate(db: sqlite3.Connection, steps: Sequence[Step] = MIGRATIONS) -> None:
    """Bring a database to the version that the steps end at, each step in one transaction.

    Raises:
        NewerSchemaError: It is of a later one.
        sqlite3.Error: A step failed; the file is as the steps before it left it.
    """
    refuse_newer(db, steps)
    for number in range(version_of(db), len(steps)):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in steps[number]:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {number + 1}")
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def refuse_newer(db: sqlite3.Connection, steps: Sequence[Step] = MIGRATIONS) -> None:
    """Look whether the steps end at the version of a database, or beyond it.

    Raises:
        NewerSchemaError: They end before it.
    """
    at = version_of(db)
    if at > len(steps):
        raise NewerSchemaError(
            f"it has schema version {at} and this release knows {len(steps)}: use the release "
            "that wrote it, or another file with --journal PATH"
        )


def version_of(db: sqlite3.Connection) -> int:
    """The schema version of a database; 0 for an empty one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)
