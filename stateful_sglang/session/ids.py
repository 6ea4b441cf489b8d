"""Session ids in logs: an id is all it takes to read and continue a session, so none is written."""

from __future__ import annotations

import hashlib


def digest(session_id: str) -> str:
    """Eight hex digits that stand for a session id wherever somebody may read it later."""
    return hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()[:8]
