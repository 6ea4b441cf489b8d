"""Who calls, from what the guard found out to what the service of sessions takes."""

from __future__ import annotations

from fastapi import Request

from stateful_sglang import tenants
from stateful_sglang.api.guard.middleware import CALLER
from stateful_sglang.service.commands import Caller


def caller_of(request: Request) -> Caller:
    """The caller of a request that is being served; also from a thread that works for it."""
    identity = getattr(request.state, CALLER, None) or tenants.current()
    return Caller(identity.tenant, identity.salt, identity.limits)
