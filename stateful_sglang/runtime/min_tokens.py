"""`min_new_tokens` gives way to a grammar that allows nothing but the end.

SGLang forbids end tokens with minus infinity until enough tokens are there. Where a grammar is
complete, it forbids all the others, and no token is left. A finite penalty forbids as surely
where anything else is allowed: its probability is exactly 0.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from stateful_sglang.attachments.check import Attachment

_PREPARE = "sglang.srt.sampling.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer._prepare"
ATTACHMENTS = (
    Attachment(
        _PREPARE,
        "hook",
        "the end of a grammar wins over min_new_tokens: the penalty of end tokens becomes finite",
    ),
)
FORBIDDEN = -1e30
"""As in SGLang's own replacement of logits that are not numbers: divided by the smallest
temperature it is still finite."""


def attach() -> None:
    """Register the hook; it holds for SGLang's own routes too."""
    HookRegistry.register(_PREPARE, _make_finite, HookType.AFTER)


def _make_finite(_result: None, penalizer: Any, *_args: Any, **_kwargs: Any) -> None:
    penalizer.stop_token_penalties.clamp_(min=FORBIDDEN)
