"""What keeps the server from being started."""

from __future__ import annotations


class LaunchError(Exception):
    """Something the user can mend; the message says what was wrong, expected, and to be done."""
