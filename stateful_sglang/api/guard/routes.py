"""Which routes are for whom, once keys exist.

Whatever is not listed here wants an administrator's key, so that a route that SGLang adds is closed
until somebody has looked at it.
"""

from __future__ import annotations

import re
from enum import Enum


class Access(Enum):
    """Who may use a route."""

    OPEN = "anybody"
    TENANT = "whoever has a key"
    ADMIN = "administrators"


OPEN = ("/", "/health", "/health_generate", "/ready", "/ping")
"""What load balancers ask; at most one token is generated, by a server that is idle."""

TENANT = (
    # Ours: what is of other tenants is told apart behind them.
    "/v1/sessions",
    "/v1/sessions/{rest}",
    # SGLang's.
    "/generate",
    "/abort_request",
    "/encode",
    "/classify",
    "/parse_function_call",
    "/separate_reasoning",
    "/model_info",
    "/get_model_info",
    "/tokenize",
    "/detokenize",
    "/v1/tokenize",
    "/v1/detokenize",
    # OpenAI's forms.
    "/v1/models",
    "/v1/models/{rest}",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/score",
    "/v1/rerank",
    "/v1/decisions",
    "/v1/responses",
    "/v1/responses/{rest}",
    "/v1/audio/transcriptions",
    "/v1/realtime",
    # Others' forms.
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/systemone",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/api/show",
    "/invocations",
    "/vertex_generate",
)
"""Routes that work with what a request brings, or with what belongs to its tenant."""

_TENANT = re.compile("|".join(re.escape(path).replace(r"\{rest\}", ".+") for path in TENANT))


def access(path: str) -> Access:
    """Who may use a path, as the application's routes are written."""
    if path in OPEN:
        return Access.OPEN
    return Access.TENANT if _TENANT.fullmatch(path) else Access.ADMIN


def route_path(path: str, root_path: str) -> str:
    """A request's path as routes are written: without the prefix that the server is mounted at.

    Written as Starlette's router takes it, so that both see the same route.
    """
    if not root_path or not path.startswith(root_path):
        return path
    if path == root_path:
        return ""
    return path[len(root_path) :] if path[len(root_path)] == "/" else path
