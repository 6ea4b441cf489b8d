"""Where drafts come from, by name: what ``--draft`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stateful_sglang.registry import Entry, Registry

if TYPE_CHECKING:
    from stateful_sglang.draft.sources.base import DraftSource

SOURCES: Registry[type[DraftSource]] = Registry(
    "draft source",
    __name__,
    {
        "suffix": Entry("suffix.SuffixSource", "what followed the same words earlier in the text"),
    },
)

AUTO, OFF = "auto", "off"
CHOICES = (AUTO, OFF, *SOURCES)
"""What ``--draft`` takes: the default source, none at all, or one by name."""

DEFAULT = "suffix"
"""The source that ``auto`` stands for."""


def chosen(draft: str) -> type[DraftSource]:
    """The source that one of ``CHOICES`` but ``off`` stands for.

    Raises:
        ValueError: There is no such source.
    """
    return SOURCES.load(DEFAULT if draft == AUTO else draft)
