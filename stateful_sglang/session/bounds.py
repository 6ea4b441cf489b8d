"""What a client may send as a number, so that no number of a request can harm the server.

The scheduler makes 32-bit tensors and indices of these values; one that doesn't fit there ends the
process, and every session with it. So each is checked where a request enters: on our own routes by
the schemas, on SGLang's by the runtime, from this one table.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from stateful_sglang.session.records import MAX_TTL_S

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


class Bound(NamedTuple):
    """The values that a number may have, both ends included."""

    low: float
    high: float
    integer: bool = True
    in_vocabulary: bool = False
    """The value names a token, or counts tokens: it may not reach the vocabulary's size either."""

    def field(self) -> dict[str, Any]:
        """The bound as arguments of a pydantic field."""
        return {"ge": self.low, "le": self.high}


def _real(low: float, high: float) -> Bound:
    return Bound(low, high, integer=False)


SAMPLING: Mapping[str, Bound] = {
    "max_new_tokens": Bound(0, INT32_MAX),
    "min_new_tokens": Bound(0, INT32_MAX),
    "temperature": _real(0, 100),
    # A value that float32 rounds to 0 would mean something else: 0 divides, or keeps no token.
    "top_p": _real(1e-30, 1),
    "top_k": Bound(-1, INT32_MAX),
    "min_p": _real(0, 1),
    "frequency_penalty": _real(-2, 2),
    "presence_penalty": _real(-2, 2),
    "repetition_penalty": _real(0.01, 2),
    "n": Bound(1, 1024),
    "beam_width": Bound(1, 1024),
    "stream_interval": Bound(1, INT32_MAX),
    "sampling_seed": Bound(-(2**63), INT64_MAX),
    "stop_token_ids": Bound(0, INT32_MAX, in_vocabulary=True),
    "logit_bias": _real(-1e9, 1e9),
    "custom_params": _real(-(2**63), INT64_MAX),
}
"""Sampling parameters under SGLang's names. A bound of a list or mapping holds for each value."""

REQUEST: Mapping[str, Bound] = {
    "input_ids": Bound(0, INT32_MAX, in_vocabulary=True),
    "logprob_start_len": Bound(-1, INT32_MAX),
    "top_logprobs_num": Bound(0, 1024, in_vocabulary=True),
    "token_ids_logprob": Bound(0, INT32_MAX, in_vocabulary=True),
    "routed_experts_start_len": Bound(0, INT32_MAX),
    "max_thinking_tokens": Bound(0, INT32_MAX),
    "priority": Bound(-(2**31), INT32_MAX),
    "dimensions": Bound(1, INT32_MAX),
    "embed_override_token_id": Bound(0, INT32_MAX, in_vocabulary=True),
    "multi_item_delimiter_indices": Bound(0, INT32_MAX),
    "token_indices_to_pool": Bound(0, INT32_MAX),
    "bootstrap_port": Bound(0, 2**16 - 1),
    "bootstrap_room": Bound(0, INT64_MAX),
    "decode_tp_size": Bound(1, 2**16),
    "routed_dp_rank": Bound(0, 2**16),
    "data_parallel_rank": Bound(0, 2**16),
    "disagg_prefill_dp_rank": Bound(0, 2**16),
    "max_dynamic_patch": Bound(0, 2**16),
    "min_dynamic_patch": Bound(0, 2**16),
    "image_max_dynamic_patch": Bound(0, 2**16),
    "video_max_dynamic_patch": Bound(0, 2**16),
    "num_items_assigned": Bound(0, 2**16),
    "video_config": _real(-(2**31), INT32_MAX),
    "images_config": _real(-(2**31), INT32_MAX),
    "received_time": _real(0, 1e12),
}
"""Other fields of SGLang's requests to generate and to embed."""

SESSION_OFFSET = Bound(0, INT32_MAX)
"""Where a turn of SGLang's own sessions continues."""
VERSION = Bound(0, INT64_MAX)
"""A version of a session."""
TTL_S = _real(1, MAX_TTL_S)
"""Seconds that a session is kept without a use."""
PAGE = Bound(1, 1000)
"""Entries of a list that one request may ask for."""
MAX_STOP_TOKENS = 256
"""Stop tokens of a request: every step's mask has a row of them."""
MAX_FAN_OUT = 1 << 16
"""Requests that one request may become by ``n``."""


def problem_of(name: str, value: Any, bound: Bound, vocab_size: int) -> str | None:
    """What is wrong with a field's numbers, naming it; None where all are within the bound.

    Lists and mappings are looked through; what is no number in a mapping passes.
    """
    high = min(bound.high, vocab_size - 1) if bound.in_vocabulary else bound.high
    return _problem(name, value, bound._replace(high=high))


def _problem(name: str, value: Any, bound: Bound) -> str | None:
    if value is None or _holds(value, bound):
        return None
    inner: Iterable[tuple[str, Any]]
    if isinstance(value, Mapping):
        inner = [(f"{name}.{key}", each) for key, each in value.items() if not _is_word(each)]
    elif isinstance(value, list | tuple | set | array):
        if _all_hold(value, bound):
            return None
        inner = [(f"{name}[{at}]", each) for at, each in enumerate(value)]
    else:
        kind = "an integer" if bound.integer else "a number"
        return (
            f"{name}: {_shown(value)} can't be used; expected {kind}, {bound.low} to {bound.high}"
        )
    return next(filter(None, (_problem(where, each, bound) for where, each in inner)), None)


def _holds(value: Any, bound: Bound) -> bool:
    kinds = int if bound.integer else (int, float)
    return isinstance(value, kinds) and bound.low <= value <= bound.high


def _all_hold(values: Collection[Any], bound: Bound) -> bool:
    """Whether all are integers within the bound: token ids come by the hundred thousand."""
    try:
        numbers = np.frombuffer(array("q", values), dtype=np.int64)
    except (TypeError, OverflowError):
        return False
    return not len(numbers) or bool(numbers.min() >= bound.low and numbers.max() <= bound.high)


def _is_word(value: Any) -> bool:
    return isinstance(value, str | bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
