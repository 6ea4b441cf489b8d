"""What each tenant has under way, counted against its limits."""

from __future__ import annotations

from dataclasses import dataclass

from stateful_sglang.tenants.limits import TenantLimits


class OverLimitError(Exception):
    """A request passes what its tenant may have under way; the message says which limit."""

    def __init__(self, message: str, *, ever: bool) -> None:
        super().__init__(message)
        self.ever = ever
        """It passes the limit all alone: sending it later does not help."""


@dataclass(slots=True)
class _Held:
    requests: int = 0
    body_bytes: int = 0


class InFlight:
    """Counts requests and the bytes of their bodies, from their start to their answer's end."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def enter(self, tenant: str, limits: TenantLimits, body_bytes: int) -> None:
        """Count a request; every `enter` that returns has its `leave`.

        Raises:
            OverLimitError: It passes a limit, and is not counted.
        """
        held = self._held.get(tenant) or _Held()
        if held.requests >= limits.requests:
            raise OverLimitError(
                f"{held.requests} requests of this tenant are in flight, its most is "
                f"{limits.requests}; send it again later",
                ever=False,
            )
        _check_bytes(held, limits, body_bytes, alone=body_bytes)
        held.requests += 1
        held.body_bytes += body_bytes
        self._held[tenant] = held

    def grow(self, tenant: str, limits: TenantLimits, body_bytes: int, so_far: int) -> None:
        """Count more bytes of a request's body, of which `so_far` are counted already.

        Raises:
            OverLimitError: They pass the limit, and are not counted.
        """
        held = self._held[tenant]
        _check_bytes(held, limits, body_bytes, alone=so_far + body_bytes)
        held.body_bytes += body_bytes

    def leave(self, tenant: str, body_bytes: int) -> None:
        """A request is over; `body_bytes` are all that were counted for it."""
        held = self._held[tenant]
        held.requests -= 1
        held.body_bytes -= body_bytes
        if not held.requests:
            del self._held[tenant]


def _check_bytes(held: _Held, limits: TenantLimits, body_bytes: int, alone: int) -> None:
    if held.body_bytes + body_bytes <= limits.pending_bytes:
        return
    ever = alone > limits.pending_bytes
    advice = "send less" if ever else "send it again later"
    raise OverLimitError(
        f"bodies of this tenant's requests in flight may have {limits.pending_bytes} bytes, and "
        f"this one passes that; {advice}",
        ever=ever,
    )
