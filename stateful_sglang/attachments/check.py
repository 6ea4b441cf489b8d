"""Every place where we touch SGLang, with a fingerprint of the source each one relies on.

A row is made where the attachment is made (each room's ``ATTACHMENTS``), gathered by
:mod:`~stateful_sglang.server.catalogue` and committed with its fingerprint in
``table.json``. Every server process compares the committed fingerprints with the installed
SGLang before it attaches anything; a mismatch stops it: running on source that was never tested
is worse than not running.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from stateful_sglang import SGLANG_VERSION
from stateful_sglang.attachments import sources
from stateful_sglang.attachments.sources import Sources

TABLE = Path(__file__).with_name("table.json")


@dataclass(frozen=True)
class Attachment:
    """One place where we touch SGLang."""

    target: str
    """Dotted path of the module, class, function or method whose source we rely on."""
    kind: Literal["registry", "hook", "subclass", "patch", "relies"]
    reason: str


class AttachmentStatus(NamedTuple):
    """An attachment compared with the installed SGLang."""

    attachment: Attachment
    expected: str
    found: str | None
    """None where the target does not exist in the installed SGLang."""

    @property
    def holds(self) -> bool:
        return self.found == self.expected


class FingerprintMismatchError(RuntimeError):
    """The installed SGLang is not the source that our attachments were tested with."""


def fingerprint(target: str, release: Sources | None = None) -> str | None:
    """SHA-256 (16 hex digits) of the target's syntax tree, or None if there is no such target.

    Comments, blank lines and formatting don't count; the module is read, never imported, so that
    the check needs neither torch nor a working SGLang.

    Args:
        target: See :attr:`Attachment.target`.
        release: Where to look; without it, in the installed SGLang.
    """
    node = (release or sources.installed()).find(target)
    return None if node is None else _digest(node)


def check(release: Sources | None = None) -> list[AttachmentStatus]:
    """Compare every committed fingerprint with a release (the installed one), importing nothing."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return [
        AttachmentStatus(
            Attachment(row["target"], row["kind"], row["reason"]),
            row["fingerprint"],
            fingerprint(row["target"], release),
        )
        for row in rows
    ]


def require_match() -> None:
    """Raise unless SGLang is the pinned release and every fingerprint holds.

    Raises:
        FingerprintMismatchError: Names the version or each function that differs.
    """
    installed = metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise FingerprintMismatchError(
            f"SGLang {installed} is installed; stateful_sglang attaches to the internals of "
            f"exactly {SGLANG_VERSION}. Run scripts/install, or "
            f"pip install sglang=={SGLANG_VERSION}."
        )
    broken = [status for status in check() if not status.holds]
    if broken:
        names = "\n  ".join(
            f"{s.attachment.target}: expected {s.expected}, found {s.found}" for s in broken
        )
        raise FingerprintMismatchError(
            f"The installed SGLang {installed} differs from the source that stateful_sglang was "
            f"tested with:\n  {names}\nReinstall sglang=={SGLANG_VERSION} unmodified."
        )


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]
