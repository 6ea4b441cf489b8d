"""Access logs without session ids: whoever reads an id there could go on with the session."""

from __future__ import annotations

import logging
import re
from urllib.parse import unquote

from stateful_sglang.session.ids import digest

LOGGERS = ("uvicorn.access", "uvicorn.error")
_IN_TARGET = re.compile(
    r"(/v1/sessions/(?!import(?:[?#\s\"]|$))|[?&](?:session_id|after)=)([^/?&#\s\"]+)"
)
"""Where a target has a session's id; ``/v1/sessions/import`` is a route."""


def redacted(text: str) -> str:
    """A request's target, or a line with it, with digests in place of session ids."""
    return _IN_TARGET.sub(lambda found: found[1] + digest(unquote(found[2])), text)


class SessionIdFilter(logging.Filter):
    """Lets every record pass, and no session id with it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str):
            record.msg = redacted(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(
                redacted(value) if isinstance(value, str) else value for value in record.args
            )
        return True


def install() -> None:
    """Keep session ids out of uvicorn's logs; it replaces its loggers' handlers, not filters."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, SessionIdFilter) for each in logger.filters):
            logger.addFilter(SessionIdFilter())
