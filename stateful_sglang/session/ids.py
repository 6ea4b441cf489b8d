"""Ids that can't be guessed, and what stands for them in logs: an id is all it takes to read and
continue a session where there are no keys, so none is written."""

from __future__ import annotations

import hashlib
import secrets


def digest(session_id: str) -> str:
    """Eight hex digits that stand for a session id wherever somebody may read it later."""
    return hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()[:8]


def new_session_id() -> str:
    """An id of a session."""
    return secrets.token_urlsafe(18)


def new_rid() -> str:
    """An id of a request; of one length, because SGLang's abort matches ids by prefix."""
    return secrets.token_hex(16)
