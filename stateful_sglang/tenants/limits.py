"""How much of a server one tenant may hold at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """Most that one tenant holds; the defaults are a server's for tenants that say nothing.

    Raises:
        ValueError: From the constructor, where a limit is no number of at least 1.
    """

    sessions: int = 4096
    """Open sessions."""
    tokens: int = 100_000_000
    """Tokens of its open sessions' transcripts, shared ones counted once for each."""
    requests: int = 256
    """Requests in flight, streams and WebSockets included."""
    pending_bytes: int = 256 << 20
    """Bytes of bodies of requests in flight."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
