"""What a tenant's KV is found under, and what of it a client has a say in."""

from __future__ import annotations

import hashlib
import hmac
import re

_OURS = re.compile(r"[0-9a-f]{32}")
"""How the server's own request ids look (`uuid4().hex`), and those that `request_id` makes."""


def narrowed(salt: str | None, own: str | None) -> str | None:
    """The salt of a request: its tenant's, narrowed by the client's own.

    With a tenant's salt the client's is hashed under it. So whatever a client gives, be it another
    tenant's salt as it is, it reaches nothing outside its tenant.
    """
    if salt is None:
        return own
    return _under(salt, own) if own else salt


def request_id(salt: str | None, given: str) -> str:
    """The id under which a request that its client named runs.

    SGLang's scheduler aborts by prefix, so that ids have to be of one length, or a client that
    names its request ``a`` ends the others' when it leaves. And a name is its tenant's own: under
    another salt it is another request's id. Without tenants an id of ours stays what it is.

    Returns:
        32 hexadecimal digits, always the same ones for the same arguments.
    """
    if salt is None and _OURS.fullmatch(given):
        return given
    return _under(salt or "", f"request {given}")[:32]


def _under(salt: str, text: str) -> str:
    # JSON can hold halves of surrogate pairs, which UTF-8 otherwise refuses.
    data = text.encode("utf-8", "surrogatepass")
    return hmac.new(salt.encode(), data, hashlib.sha256).hexdigest()
