"""Every attachment compared with another release of SGLang: what an upgrade would have to read."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from stateful_sglang.attachments import sources
from stateful_sglang.attachments.check import Attachment, AttachmentStatus, check
from stateful_sglang.attachments.sources import Sources

Verdict = Literal["holds", "changed", "gone"]


class Comparison(NamedTuple):
    """One attachment in another release."""

    attachment: Attachment
    verdict: Verdict
    diff: str
    """Unified, of the source without comments and formatting, from the release that we are bound
    to; empty where nothing changed, or where that release is not the one installed."""


def compare(other: Sources) -> list[Comparison]:
    """Compare every committed fingerprint with `other`, and the sources of those that differ.

    Raises:
        ReleaseError: A module of `other` cannot be read.
    """
    here = {row.attachment: row for row in check()}
    return [_compare(row, here[row.attachment], other) for row in check(other)]


def _compare(there: AttachmentStatus, here: AttachmentStatus, other: Sources) -> Comparison:
    if there.holds:
        return Comparison(there.attachment, "holds", "")
    if there.found is None:
        return Comparison(there.attachment, "gone", "")
    target = there.attachment.target
    diff = _diff(target, sources.installed(), other) if here.holds else ""
    return Comparison(there.attachment, "changed", diff)


def _diff(target: str, old: Sources, new: Sources) -> str:
    before, after = old.find(target), new.find(target)
    assert before is not None
    assert after is not None
    lines = difflib.unified_diff(
        ast.unparse(before).splitlines(),
        ast.unparse(after).splitlines(),
        f"{target} ({old.name})",
        f"{target} ({new.name})",
        lineterm="",
    )
    return "\n".join(lines)


def report(comparisons: Iterable[Comparison], name: str) -> str:
    """The comparison for a person: what is gone, what changed with its diff, and the counts."""
    rows = sorted(comparisons, key=lambda row: (row.verdict != "gone", row.attachment.target))
    blocks = []
    for row in rows:
        if row.verdict != "holds":
            head = f"{row.verdict}: {row.attachment.target}\n"
            head += f"    {row.attachment.kind}: {row.attachment.reason}\n"
            blocks.append(head + (f"{row.diff}\n" if row.diff else ""))
    counts = dict.fromkeys(("holds", "changed", "gone"), 0)
    for row in rows:
        counts[row.verdict] += 1
    if counts["changed"] and not any(row.diff for row in rows):
        blocks.append("no diffs: the SGLang installed here is not the one we are bound to\n")
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    blocks.append(f"{name}: {len(rows)} attachments: {summary}")
    return "\n".join(blocks)
