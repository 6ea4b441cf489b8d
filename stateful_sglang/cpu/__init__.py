"""What makes SGLang's CPU device work, and work in proportion to what is new."""

from stateful_sglang.cpu.attach import ATTACHMENTS, attach

__all__ = ["ATTACHMENTS", "attach"]
