"""A stop string ends the answer in whatever tokens it was generated, drafts or not.

SGLang looks for it in the text of the last tokens, as many as the stop string's own encoding has.
A grammar or a sampler may spell it in more tokens: it would pass unseen. A token holds at least a
byte, so as many tokens as the stop string has bytes are always enough.

Where verification accepts several tokens at once, SGLang looks at them together, and the first of
the request's stop strings in its list wins, even over an end token before it. Here each token is
looked at as if it had been decoded alone, so that drafts change no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from stateful_sglang.attachments.check import Attachment

_REQ = "sglang.srt.managers.schedule_batch.Req"
ATTACHMENTS = (
    Attachment(
        f"{_REQ}._stop_match_tail_len",
        "hook",
        "stop strings are looked for in as many tokens as they have bytes, not as their encoding",
    ),
    Attachment(
        f"{_REQ}._check_str_based_finish",
        "hook",
        "tokens accepted at once are checked one by one, and the earliest stop string is named",
    ),
    Attachment(
        f"{_REQ}._check_token_based_finish",
        "relies",
        "an end token among those accepted at once comes before a stop string behind it",
    ),
    Attachment(
        f"{_REQ}._locate_str_stop_finished_len",
        "relies",
        "where one token is new, a stop string ends with the output",
    ),
    Attachment(
        f"{_REQ}.tail_str",
        "relies",
        "the text that stop strings are looked for in",
    ),
)
_MAX_CHARACTER_BYTES = 4


def attach() -> None:
    """Register the hooks; they hold for SGLang's own routes too."""
    HookRegistry.register(f"{_REQ}._stop_match_tail_len", _widen, HookType.AFTER)
    HookRegistry.register(f"{_REQ}._check_str_based_finish", _check_one_by_one, HookType.AROUND)


def _widen(tail_len: int, req: Any, new_accepted_len: int = 1) -> int:
    """Output tokens, counted from the end, that hold any stop which the new ones complete."""
    params, output = req.sampling_params, req.output_ids
    # SGLang counts the characters that an expression matches, not their tokens.
    stop_bytes = _MAX_CHARACTER_BYTES * params.stop_regex_max_len
    for stop in params.stop_strs:
        stop_bytes = max(stop_bytes, len(stop) if stop.isascii() else len(stop.encode()))
    tail_len = max(tail_len, stop_bytes + max(new_accepted_len, 1))
    start = max(len(output) - tail_len, 0)
    inside = _inside_characters(req.tokenizer)
    for _ in range(_MAX_CHARACTER_BYTES - 1):
        if start > 0 and output[start] in inside:
            start -= 1
    return len(output) - start


@lru_cache(maxsize=4)
def _inside_characters(tokenizer: Any) -> frozenset[int]:
    """Tokens of one byte that begins no character, of tokenizers with such tokens.

    Their decoders make a run of byte tokens unreadable, to its end, where it begins within a
    character.
    """
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return frozenset()
    ids = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(0x80, 0xC0))
    return frozenset(ids) - {None, tokenizer.unk_token_id}


def _check_one_by_one(
    check: Callable[[Any, int], bool], req: Any, new_accepted_len: int = 1
) -> bool:
    """Whether a stop ends the request; `finished_len` is then the output through that token."""
    params, output = req.sampling_params, req.output_ids
    if new_accepted_len <= 1 or not (params.stop_strs or params.stop_regex_strs):
        return check(req, new_accepted_len) and _name_the_earliest(req)
    accepted = output[-new_accepted_len:]
    del output[-new_accepted_len:]
    seen = 0
    try:
        for token in accepted:
            output.append(token)
            seen += 1
            if check(req, 1):
                return _name_the_earliest(req)
            if req.finished_reason is not None:  # an expression that can't be searched for
                return False
            if req._check_token_based_finish([token]):
                return True
    finally:
        output.extend(accepted[seen:])
    return False


def _name_the_earliest(req: Any) -> bool:
    """Name the stop string that begins first: the answer's text is cut where the named one begins.

    SGLang names the first in the request's list; others before it would stay in the text.
    """
    stops, reason = req.sampling_params.stop_strs, req.finished_reason
    if len(stops) > 1 and isinstance(reason, FINISH_MATCHED_STR):
        text = req.tail_str()
        if found := [stop for stop in stops if stop in text]:
            # The request's own object, by which it is told from the mark of broken logits.
            req.finished_reason = FINISH_MATCHED_STR(matched=min(found, key=text.find))
    return True
