"""What keeps the server from being started."""

from __future__ import annotations

EXIT_UNUSABLE = 2
"""Exit status when the server was not started because something the user can mend is wrong."""


class LaunchError(Exception):
    """Something the user can mend; the message says what was wrong, expected, and to be done."""
