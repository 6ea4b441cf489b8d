"""What every request passes before SGLang's application or ours sees it: whence, and who."""

from stateful_sglang.api.guard.middleware import Guard, attach
from stateful_sglang.api.guard.sites import Sites

__all__ = ["Guard", "Sites", "attach"]
