"""Sessions recorded in a journal without a server: turns of prose, by some writers at once."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions, SessionRecord

Sync = Literal["full", "normal"]
_VOCABULARY = 49_152
_HEAD = Head("You are a helpful assistant.")


class Written(NamedTuple):
    """What some writers came to."""

    latencies: list[float]
    """Seconds from handing in a turn to its being recorded."""
    transactions: int
    tokens: int
    bytes: int
    """Of the closed file."""
    load_s: float
    """Seconds to read one session's history from the file, once it is out of memory."""


def write(path: Path, texts: Sequence[str], *, writers: int, turns: int, sync: Sync) -> Written:
    """Record turns of as many sessions as there are writers, each waiting for its last one.

    Args:
        path: Of a new file.
        texts: What is said, in turns.
        writers: Sessions at once.
        turns: Of each session.
        sync: See ``--journal-sync``.
    """
    return asyncio.run(_write(path, texts, writers, turns, sync))


async def _write(path: Path, texts: Sequence[str], writers: int, turns: int, sync: Sync) -> Written:
    said = [(text, _tokens(text)) for text in texts]
    journal = SqliteJournal.connect(path, sync=sync)
    latencies: list[float] = []
    tokens = 0

    async def session(number: int) -> None:
        nonlocal tokens
        name = f"session-{number:024}"
        history = History.opened(name, _HEAD)
        await journal.open(_record(history, history.tip), history)
        for turn in range(turns):
            text, ids = said[(number * turns + turn) % len(said)]
            quarter = len(text) // 4
            commit = history.prepare(
                base_len=len(history.tip.transcript),
                tokens=ids,
                head=_HEAD,
                messages=[
                    Message("user", text[:quarter]),
                    Message("assistant", text[quarter:], raw=text[quarter:]),
                ],
                finish_reason="stop",
            )
            began = time.perf_counter()
            await journal.append(_record(history, commit), commit)
            latencies.append(time.perf_counter() - began)
            history.publish(commit)
            tokens += len(ids)

    await asyncio.gather(*(session(number) for number in range(writers)))
    transactions = journal.stats().commits
    await journal.close()
    size = path.stat().st_size
    journal = SqliteJournal.connect(path, sync=sync)
    began = time.perf_counter()
    await journal.load(f"session-{0:024}")
    load_s = time.perf_counter() - began
    await journal.close()
    return Written(latencies, transactions, tokens, size, load_s)


def _record(history: History, commit: Commit) -> SessionRecord:
    return SessionRecord(
        id=commit.owner,
        tenant="default",
        model="bench",
        options=SessionOptions(),
        created_at=history.origin.created_at,
        used_at=time.time(),
        version=commit.version,
        newest=commit.version,
        tokens=len(commit.transcript),
        messages=len(commit.conversation.messages),
        finish_reason=commit.finish_reason,
    )


def _tokens(text: str) -> list[int]:
    """Numbers that repeat as the tokens of a text do: one for each word, space or sign."""
    return [
        zlib.crc32(part.encode()) % _VOCABULARY for part in re.findall(r" ?\w+|\s+|[^\w\s]+", text)
    ]
