"""The file of keys: what is in it, and how it is changed.

JSON, readable by its owner only. It holds a hash of each key, so that nobody learns a key from it,
and each tenant's salt, which nobody else may learn. Keys are random 256-bit numbers: their hash
needs no slow function, since there is nothing to guess.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stateful_sglang import cache_folder
from stateful_sglang.tenants.limits import TenantLimits

NAME = "keys.json"
_FORMAT = 1
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeysError(Exception):
    """The file of keys can't be used, or holds no such thing; says what to do."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key, which only its holder knows."""

    id: str
    """Names it to people; says nothing about the key."""
    tenant: str
    sha256: str = field(repr=False)
    """Of the key as it is sent, in hexadecimal digits."""
    admin: bool = False
    created: float = 0.0
    """Seconds since the epoch, as all times here."""
    revoked: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """What a file says of one tenant."""

    salt: str = field(repr=False)
    """256 random bits in hexadecimal digits; never derived from the name, which others can know."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Those of `TenantLimits` that differ from the server's defaults."""


@dataclass(frozen=True, slots=True)
class Content:
    """All that a file says."""

    keys: tuple[Key, ...] = ()
    tenants: Mapping[str, Tenant] = field(default_factory=dict)


def default_path(cache_dir: Path | None = None) -> Path:
    """Where the file is, unless one is named."""
    return cache_folder.root(cache_dir) / NAME


def hash_of(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> Content:
    """What a file says.

    Raises:
        FileNotFoundError: There is none.
        KeysError: It is unreadable, others can read it, or it holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path} can't be read: {error}") from error
    if mode & 0o077:
        raise KeysError(
            f"{path} has the mode {mode:04o}, so that others can read the tenants' salts; "
            f"run chmod 600 {path}"
        )
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The message of a broken line would show what stands in it.
        raise KeysError(
            f"{path} is no file of keys ({type(error).__name__}); restore it, or move it away and "
            "make new keys with stateful-sglang keys add"
        ) from None


def add(path: Path, tenant: str, *, admin: bool = False) -> tuple[Key, str]:
    """Make a key for a tenant, and the file and the tenant where they are not there yet.

    Returns:
        What is kept of it, and the key itself, which is kept nowhere.

    Raises:
        KeysError: The name won't do, or the file.
    """
    if not _TENANT.fullmatch(tenant):
        raise KeysError(
            f"{tenant!r} is no name of a tenant; expected up to 64 of A-Z a-z 0-9 . _ -, the first "
            "one a letter or a digit"
        )
    secret = f"sk-{secrets.token_urlsafe(32)}"
    key = Key(secrets.token_hex(4), tenant, hash_of(secret), admin, time.time())
    with _changing(path) as content:
        tenants = dict(content.tenants)
        tenants.setdefault(tenant, Tenant(secrets.token_hex(32)))
        _write(path, Content((*content.keys, key), tenants))
    return key, secret


def revoke(path: Path, key_id: str) -> Key:
    """Let a key be good no more; it stays listed.

    Raises:
        KeysError: There is no such key, or the file won't do.
    """
    with _changing(path) as content:
        found = next((key for key in content.keys if key.id == key_id), None)
        if found is None:
            raise KeysError(f"{path} has no key {key_id!r}; stateful-sglang keys list shows all")
        gone = found if found.revoked is not None else replace(found, revoked=time.time())
        keys = tuple(gone if key is found else key for key in content.keys)
        _write(path, Content(keys, content.tenants))
    return gone


def limit(path: Path, tenant: str, limits: Mapping[str, int]) -> TenantLimits:
    """Set some of a tenant's limits; the others stay.

    Raises:
        KeysError: There is no such tenant, a limit won't do, or the file.
    """
    with _changing(path) as content:
        found = content.tenants.get(tenant)
        if found is None:
            raise KeysError(
                f"{path} has no tenant {tenant!r}; make it a key first: stateful-sglang keys add "
                f"--tenant {tenant}"
            )
        changed = replace(found, limits={**found.limits, **limits})
        try:
            result = TenantLimits(**changed.limits)
        except (TypeError, ValueError) as error:
            raise KeysError(str(error)) from error
        _write(path, Content(content.keys, {**content.tenants, tenant: changed}))
    return result


@contextmanager
def _changing(path: Path) -> Iterator[Content]:
    """The content, while no other process of ours changes it; a lock file stays beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KeysError(f"{path} can't be changed: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            content = read(path)
        except FileNotFoundError:
            content = Content()
        yield content
    finally:
        os.close(descriptor)


def _write(path: Path, content: Content) -> None:
    """Put another file in the place of this one, at once: a reader sees the old or the new."""
    document = {
        "format": _FORMAT,
        "tenants": {name: asdict(tenant) for name, tenant in content.tenants.items()},
        "keys": [asdict(key) for key in content.keys],
    }
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # is 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _parse(document: Any) -> Content:
    """Raises whatever is at hand where the document is not as `_write` makes it."""
    if document["format"] != _FORMAT:
        raise ValueError
    tenants = {name: Tenant(**entry) for name, entry in document["tenants"].items()}
    for tenant in tenants.values():
        TenantLimits(**tenant.limits)
    keys = tuple(Key(**entry) for entry in document["keys"])
    right = all(
        isinstance(key.id, str)
        and isinstance(key.admin, bool)
        and _HASH.fullmatch(key.sha256)
        and key.tenant in tenants
        for key in keys
    ) and all(_HASH.fullmatch(tenant.salt) for tenant in tenants.values())
    if not right:
        raise ValueError
    return Content(keys, tenants)
