"""Clients that close their connection while a turn runs for them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from typing import Any, Literal, NamedTuple

How = Literal["close", "reset"]
_LINGER = struct.pack("ii", 1, 0)


class Leave(NamedTuple):
    """How a client leaves."""

    stream: bool
    """It reads events; otherwise it waits for the whole answer."""
    after_s: float
    """Seconds after its request."""
    deltas: int
    """Events that it reads first, where it streams."""
    how: How
    """By the end of what it sends, or with a reset."""


def random_leave(rng: random.Random, longest_s: float) -> Leave:
    """A client that leaves before the first token, or while some are still to come."""
    return Leave(
        rng.random() < 0.5,
        rng.choice((0.0, rng.uniform(0, longest_s))),
        rng.choice((0, 0, 1, 2, 5)),
        rng.choice(("close", "reset")),
    )


def leave(address: tuple[str, int], path: str, body: Any, leave: Leave) -> bool:
    """Ask for a turn, and be gone.

    Returns:
        Whether the answer had ended before, so that nothing was left.
    """
    data = json.dumps({**body, "stream": leave.stream}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head.encode() + data)
        read = b""
        while leave.stream and read.count(b"event: delta") < leave.deltas:
            piece = connection.recv(65536)
            read += piece
            if not piece or b"event: done" in read or b"event: error" in read:
                break
        time.sleep(leave.after_s)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            read += connection.recv(1 << 20)
        if leave.how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    return b"event: done" in read or (not leave.stream and bool(read))
