"""A typed Python client of sessions, synchronous and asynchronous."""

from stateful_sglang.frontend.aio import AsyncClient, AsyncSession, AsyncTurnStream
from stateful_sglang.frontend.client import Client, Session, TurnStream
from stateful_sglang.frontend.errors import (
    ApiError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    SessionBusyError,
    SessionClosedError,
    SessionNotFoundError,
    VersionMismatchError,
)
from stateful_sglang.frontend.types import ToolCall, Turn
from stateful_sglang.session.turn import Usage

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncSession",
    "AsyncTurnStream",
    "Client",
    "ConflictError",
    "ContextLengthError",
    "InvalidRequestError",
    "OverloadedError",
    "ServerError",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "SessionNotFoundError",
    "ToolCall",
    "Turn",
    "TurnStream",
    "Usage",
    "VersionMismatchError",
]
