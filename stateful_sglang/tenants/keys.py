"""The keys of a running server: who holds which, as the file says now."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stateful_sglang.tenants import keys_file
from stateful_sglang.tenants.identity import Identity
from stateful_sglang.tenants.limits import TenantLimits

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
"""Longest time that a change of the file goes unnoticed while requests come in."""

_Signature = tuple[int, int, int]


class Keys:
    """Looks keys up, and the file again where it has changed.

    Once a file was there, keys are needed for good: one that is broken or gone later opens nothing,
    the last good one holds.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file, if it is there.

        Args:
            path: The file.
            clock: Seconds, of any beginning.

        Raises:
            KeysError: It is there, and can't be used.
        """
        self._path = path
        self._clock = clock
        self._holders: Mapping[str, Identity] | None = None
        self._seen: _Signature | None = _signature(path)
        if self._seen is not None:
            self._holders = _holders(keys_file.read(path))
        self._checked_at = clock()

    @property
    def exist(self) -> bool:
        """Whether callers need a key: a file is there, or was, be all its keys revoked."""
        self._look_again()
        return self._holders is not None

    def identify(self, key: str) -> Identity | None:
        """Whose key this is; None: nobody's, or it is revoked."""
        self._look_again()
        digest = keys_file.hash_of(key)
        # The time of finding a hash says nothing of use about the key that it is made of.
        for known, identity in (self._holders or {}).items():
            if hmac.compare_digest(known, digest):
                return identity
        return None

    def _look_again(self) -> None:
        now = self._clock()
        if now - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = now
        signature = _signature(self._path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._holders = _holders(keys_file.read(self._path))
        except (keys_file.KeysError, FileNotFoundError) as error:
            self._holders = self._holders if self._holders is not None else {}
            logger.error("keys stay as they were: %s", error)
        else:
            logger.info("keys were read again: %d are good", len(self._holders))


def _signature(path: Path) -> _Signature | None:
    """Changes whenever another file is put in this one's place; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _holders(content: keys_file.Content) -> dict[str, Identity]:
    identities = {}
    for key in content.keys:
        if key.revoked is None:
            tenant = content.tenants[key.tenant]
            limits = TenantLimits(**tenant.limits)
            identities[key.sha256] = Identity(key.tenant, key.admin, tenant.salt, limits)
    return identities
