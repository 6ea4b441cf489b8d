"""Trying again: what is worth it, how often, and how long to wait in between.

A request that carries an idempotency key is the same request when it comes again: the server
answers it with what the first one gave, or joins it while it runs. So a server that is started
again is a delay, and no more.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from stateful_sglang.client.errors import ApiError, StreamCutError

KEY = "idempotency_key"
"""Field of a body that names the request."""
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, StreamCutError)
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


@dataclass(frozen=True)
class Retries:
    """How often a request is sent again. By default 5 times within about a minute."""

    most: int = 5
    first_s: float = 2.0
    """Before the first repetition; doubled for each further one, give or take a quarter."""
    most_s: float = 60.0
    """Longest wait, also of those that a server asks for."""


class Attempts:
    """The attempts of one request."""

    def __init__(
        self, retries: Retries, method: str, body: Any = None, *, repeatable: bool = False
    ) -> None:
        """`repeatable`: it does the same twice as once, though neither method nor body say so."""
        self._retries = retries
        self._made = 0
        keyed = isinstance(body, Mapping) and KEY in body
        self._repeatable = repeatable or keyed or method in _SAFE_METHODS

    def pause(self, error: Exception) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            Exception: The error, where there is no use in another attempt, or none is left.
        """
        if self._made >= self._retries.most or not self._passes(error):
            raise error
        seconds: float = self._retries.first_s * 2**self._made * random.uniform(0.75, 1.25)
        self._made += 1
        asked = error.retry_after or 0.0 if isinstance(error, ApiError) else 0.0
        return min(max(seconds, asked), self._retries.most_s)

    def _passes(self, error: Exception) -> bool:
        """Whether another attempt may go better, and does nothing twice."""
        if isinstance(error, _UNREACHED):
            return True
        if isinstance(error, _BROKEN):
            return self._repeatable
        # The server says that it has done nothing, and when to come again.
        return isinstance(error, ApiError) and error.status == 503 and error.retry_after is not None


def keyed(body: Mapping[str, Any], retries: Retries) -> dict[str, Any]:
    """The body with a key of its own, where it has none and may be sent more than once."""
    if not retries.most or body.get(KEY) is not None:
        return dict(body)
    return {**body, KEY: secrets.token_urlsafe(16)}
