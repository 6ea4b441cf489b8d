"""``stateful-sglang keys``: make keys, list them, revoke them, set tenants' limits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from stateful_sglang.tenants import keys_file
from stateful_sglang.tenants.limits import TenantLimits

app = typer.Typer(
    name="keys",
    help="API keys of a server: who may use it, and what of it is kept apart.",
    no_args_is_help=True,
)
File = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="FILE",
        help="The file of keys.",
        show_default="keys.json in the cache folder",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The cache folder, as serve is told it.", show_default=False),
]
TenantName = Annotated[str, typer.Option(help="Whose key it is.", metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command()
def add(
    tenant: TenantName,
    admin: Annotated[
        bool, typer.Option("--admin", help="It also opens what concerns all tenants.")
    ] = False,
    keys: File = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, this once; servers that run take it within a second."""
    path = keys or keys_file.default_path(cache_dir)
    with _told():
        key, secret = keys_file.add(path, tenant, admin=admin)
    if as_json:
        print(json.dumps({"key": secret, **_row(key)}))
        return
    print(secret)
    print(f"Key {key.id} of tenant {tenant}; {path} keeps its hash only.", file=sys.stderr)


@app.command("list")
def list_keys(keys: File = None, cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Every key and every tenant, revoked keys included."""
    path = keys or keys_file.default_path(cache_dir)
    with _told():
        try:
            content = keys_file.read(path)
        except FileNotFoundError:
            content = keys_file.Content()
    rows = [_row(key) for key in content.keys]
    limits = {
        name: asdict(TenantLimits(**tenant.limits)) for name, tenant in content.tenants.items()
    }
    if as_json:
        print(json.dumps({"keys": rows, "limits": limits}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not rows:
        console.print(f"No keys in {path}: whoever reaches the server may use it.")
        return
    table = Table("id", "tenant", "admin", "created", "revoked")
    for row in rows:
        table.add_row(
            row["id"],
            row["tenant"],
            "yes" if row["admin"] else "",
            row["created"],
            row["revoked"] or "",
        )
    console.print(table)
    bounds = Table("tenant", *(each.name for each in fields(TenantLimits)))
    for name, values in limits.items():
        bounds.add_row(name, *(str(value) for value in values.values()))
    console.print(bounds)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key, as list shows it.")],
    keys: File = None,
    cache_dir: CacheDir = None,
) -> None:
    """Let a key be good no more, within a second; requests that run go on."""
    with _told():
        key = keys_file.revoke(keys or keys_file.default_path(cache_dir), key_id)
    print(f"Key {key.id} of tenant {key.tenant} is revoked.")


@app.command()
def limit(
    tenant: TenantName,
    sessions: Annotated[int | None, typer.Option(help="Open sessions.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of open sessions.", min=1)] = None,
    requests: Annotated[int | None, typer.Option(help="Requests in flight.", min=1)] = None,
    pending_bytes: Annotated[
        int | None, typer.Option(help="Bytes of bodies of requests in flight.", min=1)
    ] = None,
    keys: File = None,
    cache_dir: CacheDir = None,
) -> None:
    """Set how much a tenant may hold at a time; what is not named stays."""
    asked = {
        "sessions": sessions,
        "tokens": tokens,
        "requests": requests,
        "pending_bytes": pending_bytes,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    with _told():
        limits = keys_file.limit(keys or keys_file.default_path(cache_dir), tenant, given)
    print(", ".join(f"{name} {value}" for name, value in asdict(limits).items()))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except keys_file.KeysError as error:
        print(f"stateful-sglang: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _row(key: keys_file.Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "admin": key.admin,
        "created": _time(key.created),
        "revoked": None if key.revoked is None else _time(key.revoked),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
