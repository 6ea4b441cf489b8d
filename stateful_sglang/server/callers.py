"""Who calls, from what the guard found out to what the service of sessions takes."""

from __future__ import annotations

from fastapi import Request

from stateful_sglang import tenants
from stateful_sglang.service.commands import Caller


def caller_of(_: Request) -> Caller:
    """The caller of the request that is being served."""
    identity = tenants.current()
    return Caller(identity.tenant, identity.salt, identity.limits)
