"""Records and keyed results as rows of a journal, and back."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from stateful_sglang.session.journal import codec
from stateful_sglang.session.journal.codec import Column
from stateful_sglang.session.records import (
    CommitRef,
    KeyedResult,
    PrefixRecord,
    SessionOptions,
    SessionRecord,
)

COLUMNS = (
    "id, tenant, model, state, created_at, used_at, version, newest, tokens, messages, pending,"
    " tools, finish_reason, origin_owner, origin_version, metadata, ttl_s, retention,"
    " priority, private"
)
"""Of ``sessions``, in the order that `record` reads."""
KEYED_COLUMNS = "tenant, scope, key, digest, result, created_at"
PREFIX_COLUMNS = "id, name, model, tokens, created_at"


def values(record: SessionRecord) -> dict[str, Any]:
    """A record by column."""
    options, origin = record.options, record.origin
    return {
        "id": codec.name(record.id),
        "tenant": codec.name(record.tenant),
        "model": codec.name(record.model),
        "state": record.state,
        "created_at": record.created_at,
        "used_at": record.used_at,
        "version": record.version,
        "newest": record.newest,
        "tokens": record.tokens,
        "messages": record.messages,
        "pending": record.pending,
        "tools": codec.dump(record.tools),
        "finish_reason": _name(record.finish_reason),
        "origin_owner": None if origin is None else codec.name(origin.owner),
        "origin_version": None if origin is None else origin.version,
        "metadata": codec.dump(dict(options.metadata)),
        "ttl_s": options.ttl_s,
        "retention": options.retention,
        "priority": options.priority,
        "private": int(options.private),
    }


def record(row: tuple[Any, ...]) -> SessionRecord:
    """The record in a row of `COLUMNS`.

    Raises:
        DamagedError: It holds none.
    """
    (id_, tenant, model, state, created_at, used_at, version, newest, tokens, messages) = row[:10]
    (
        pending,
        tools,
        finish_reason,
        owner,
        origin,
        metadata,
        ttl_s,
        retention,
        priority,
        private,
    ) = row[10:]
    return SessionRecord(
        id=codec.from_name(id_),
        tenant=codec.from_name(tenant),
        model=codec.from_name(model),
        options=SessionOptions(metadata_of(metadata), ttl_s, retention, priority, bool(private)),
        created_at=created_at,
        used_at=used_at,
        state=state,
        version=version,
        newest=newest,
        tokens=tokens,
        messages=messages,
        pending=pending,
        tools=tuple(codec.parse(tools)),
        finish_reason=None if finish_reason is None else codec.from_name(finish_reason),
        origin=None if owner is None else CommitRef(codec.from_name(owner), origin),
    )


def metadata_of(blob: bytes) -> Mapping[str, str]:
    """The pairs in a column.

    Raises:
        DamagedError: It holds none.
    """
    found = codec.parse(blob)
    if not isinstance(found, dict):
        raise codec.DamagedError("a blob holds no metadata")
    return found


def keyed_values(keyed: KeyedResult) -> tuple[Any, ...]:
    """A keyed result by `KEYED_COLUMNS`."""
    names = (codec.name(text) for text in (keyed.tenant, keyed.scope, keyed.key, keyed.digest))
    return (*names, codec.dump(dict(keyed.result)), keyed.created_at)


def keyed_result(row: tuple[Any, ...]) -> KeyedResult:
    """The keyed result in a row of `KEYED_COLUMNS`.

    Raises:
        DamagedError: It holds none.
    """
    *names, result, created_at = row
    tenant, scope, key, digest = (codec.from_name(each) for each in names)
    return KeyedResult(tenant, scope, key, digest, codec.parse(result), created_at)


def prefix_values(prefix: PrefixRecord) -> tuple[Any, ...]:
    """A published prefix by `PREFIX_COLUMNS`."""
    return (
        codec.name(prefix.id),
        _name(prefix.name),
        codec.name(prefix.model),
        codec.dump_tokens(array("i", prefix.tokens)),
        prefix.created_at,
    )


def prefix(row: tuple[Any, ...]) -> PrefixRecord:
    """The published prefix in a row of `PREFIX_COLUMNS`.

    Raises:
        DamagedError: It holds none.
    """
    id_, name, model, tokens, created_at = row
    return PrefixRecord(
        codec.from_name(id_),
        None if name is None else codec.from_name(name),
        codec.from_name(model),
        array("q", codec.parse_tokens(tokens)),
        created_at,
    )


def _name(text: str | None) -> Column | None:
    return None if text is None else codec.name(text)
