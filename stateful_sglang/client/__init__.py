"""A typed Python client of sessions, synchronous and asynchronous."""

from stateful_sglang.client.aio import AsyncClient, AsyncSession
from stateful_sglang.client.errors import (
    AccessDeniedError,
    ApiError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    KeyReusedError,
    NotRecordedError,
    OtherModelError,
    OverloadedError,
    ServerError,
    SessionBusyError,
    SessionClosedError,
    SessionGoneError,
    SessionNotFoundError,
    StaleBaseError,
    StreamCutError,
    StreamDivergedError,
    UnknownVersionError,
    VersionMismatchError,
)
from stateful_sglang.client.streams import AsyncEvents, AsyncTurnStream, Events, TurnStream
from stateful_sglang.client.sync import Client, Session
from stateful_sglang.client.types import Event, Ingested, SessionPage, ToolCall, Turn
from stateful_sglang.service.results import Usage

__all__ = [
    "AccessDeniedError",
    "ApiError",
    "AsyncClient",
    "AsyncEvents",
    "AsyncSession",
    "AsyncTurnStream",
    "Client",
    "ConflictError",
    "ContextLengthError",
    "Event",
    "Events",
    "Ingested",
    "InvalidRequestError",
    "KeyReusedError",
    "NotRecordedError",
    "OtherModelError",
    "OverloadedError",
    "ServerError",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "SessionGoneError",
    "SessionNotFoundError",
    "SessionPage",
    "StaleBaseError",
    "StreamCutError",
    "StreamDivergedError",
    "ToolCall",
    "Turn",
    "TurnStream",
    "UnknownVersionError",
    "Usage",
    "VersionMismatchError",
]
