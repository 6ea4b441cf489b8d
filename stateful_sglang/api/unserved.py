"""Routes of SGLang that this server cannot serve answer 501 with the reason.

SGLang makes its handlers at start and goes on without those that fail; their routes then find no
handler and answer a bare 500.
"""

from __future__ import annotations

import logging
import re

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

_NO_HANDLER = re.compile(r"^'State' object has no attribute '(\w+)'$")
_DISABLED = re.compile(r"\((?P<path>/\S+)\) disabled: (?P<reason>.*)", re.DOTALL)
_LOGGER = "sglang.srt.entrypoints.http_server"


class _Reasons(logging.Filter):
    """Remembers what SGLang logs about handlers that it could not make; drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by_path: dict[str, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        found = _DISABLED.search(record.getMessage())
        if found is not None:
            self.by_path[found["path"]] = found["reason"]
        return True


def attach(app: FastAPI) -> None:
    """Answer for handlers that are missing in `app`; its other errors stay what they were."""
    reasons = _Reasons()
    logging.getLogger(_LOGGER).addFilter(reasons)

    async def answer(request: Request, error: Exception) -> Response:
        missing = _NO_HANDLER.match(str(error))
        if missing is None:
            raise error
        path = request.url.path
        reason = next(
            (text for start, text in reasons.by_path.items() if path.startswith(start)),
            f"{missing[1]} was not made at the server's start, whose log says why",
        )
        message = f"{request.method} {path} cannot be served here: {reason}"
        body = {"message": message, "type": "not_implemented", "param": None, "code": 501}
        return JSONResponse({"error": body}, 501)

    app.add_exception_handler(AttributeError, answer)
