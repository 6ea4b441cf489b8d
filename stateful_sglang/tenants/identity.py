"""Whom a request comes from, and how what runs for it gets to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from stateful_sglang.session.records import DEFAULT_TENANT
from stateful_sglang.tenants.limits import TenantLimits


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller, as its key says."""

    tenant: str = DEFAULT_TENANT
    admin: bool = False
    """May use what concerns all tenants."""
    salt: str | None = field(default=None, repr=False)
    """Random and secret: KV of this tenant is found under it only. None: kept apart from nobody."""
    limits: TenantLimits | None = None
    """None: none."""


ALONE = Identity(admin=True)
"""Any caller of a server without keys."""
SERVER = Identity(admin=True)
"""The server itself: its warm-up, and what it runs for no request."""
NOBODY = Identity(tenant="")
"""A caller without a key, on a route that needs none."""

_CURRENT: ContextVar[Identity] = ContextVar("stateful_sglang_caller", default=SERVER)


def current() -> Identity:
    """Whose request this runs for: tasks that a request starts inherit it."""
    return _CURRENT.get()


@contextmanager
def acting_as(identity: Identity) -> Iterator[None]:
    """Let `current` be this caller within the context."""
    token = _CURRENT.set(identity)
    try:
        yield
    finally:
        _CURRENT.reset(token)
