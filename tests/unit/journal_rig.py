"""Sessions to be recorded, made without a service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import CommitRef, SessionOptions, SessionRecord

T = TypeVar("T")
HEAD = Head("be brief", ({"type": "function", "function": {"name": "look"}},), {"thinking": True})
TENANT = "default"


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str) -> Message:
    return Message("assistant", text, raw=text)


def record_of(
    history: History,
    session_id: str,
    commit: Commit | None = None,
    *,
    used_at: float = 1000.0,
    tenant: str = TENANT,
    options: SessionOptions | None = None,
) -> SessionRecord:
    """The record of a session at its history's tip, or at a commit about to be published."""
    tip = commit or history.tip
    origin = history.origin
    return SessionRecord(
        id=session_id,
        tenant=tenant,
        model="m",
        options=options or SessionOptions(),
        created_at=1000.0,
        used_at=used_at,
        version=tip.version,
        newest=max(history.newest, tip.version),
        tokens=len(tip.transcript),
        messages=len(tip.conversation.messages),
        tools=tuple(tip.conversation.head.tool_names()),
        finish_reason=tip.finish_reason,
        origin=None if origin.owner == session_id else CommitRef(origin.owner, origin.version),
    )


def prepared(
    history: History,
    tokens: Iterable[int],
    messages: Sequence[Message] | None = None,
    **more: Any,
) -> Commit:
    parent = more.get("parent") or history.tip
    more.setdefault("base_len", len(parent.transcript))
    return history.prepare(tokens=tokens, head=HEAD, messages=messages, **more)


async def opened(
    journal: SqliteJournal, session_id: str, *messages: Message, **more: Any
) -> History:
    history = History.opened(session_id, HEAD, messages)
    await journal.open(record_of(history, session_id, **more), history)
    return history


async def turn(
    journal: SqliteJournal, history: History, session_id: str, text: str, size: int = 8
) -> Commit:
    """One turn recorded and published."""
    commit = prepared(history, range(size), [user(text), answer(text[::-1])])
    await journal.append(record_of(history, session_id, commit), commit)
    history.publish(commit)
    return commit


def run(path: Path | None, use: Callable[[SqliteJournal], Awaitable[T]], **options: Any) -> T:
    """Open a journal, use it, close it."""

    async def whole() -> T:
        journal = SqliteJournal.connect(path, **options)
        try:
            return await use(journal)
        finally:
            await journal.close()

    return asyncio.run(whole())


def facts(commit: Commit) -> tuple[Any, ...]:
    """All that a commit says."""
    return (
        commit.owner,
        commit.version,
        None if commit.parent is None else (commit.parent.owner, commit.parent.version),
        commit.base_len,
        list(commit.transcript),
        list(commit.conversation.messages),
        commit.conversation.head,
        commit.conversation.shape,
        commit.conversation.raw,
        commit.pending,
        commit.finish_reason,
        commit.created_at,
    )
