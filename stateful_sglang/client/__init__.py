"""A typed Python client of sessions, synchronous and asynchronous."""

from stateful_sglang.client.aio import AsyncClient, AsyncSession, AsyncTurnStream
from stateful_sglang.client.errors import (
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
from stateful_sglang.client.sync import Client, Session, TurnStream
from stateful_sglang.client.types import ToolCall, Turn
from stateful_sglang.service.results import Usage

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
