"""What the CPU room attaches to SGLang, and the attaching itself."""

from __future__ import annotations

from stateful_sglang.runtime.attachments import Attachment

ATTACHMENTS: tuple[Attachment, ...] = ()


def attach() -> None:
    """Make SGLang's CPU device use our engine; nothing happens where it runs on an accelerator."""
