"""What all tests share: hypothesis times no example, since a shared machine is slow at times."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
