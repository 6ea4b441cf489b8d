"""How a request ended, as far as its KV is concerned."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_STR

from stateful_sglang.attachments.check import Attachment

_NAN_MARK = "NaN happened"
_REQ = "sglang.srt.managers.schedule_batch.Req"
ATTACHMENTS = (
    Attachment(
        f"{_REQ}._check_vocab_boundary_finish",
        "relies",
        "NaN logits finish as a matched string, which we don't commit",
    ),
    Attachment(
        f"{_REQ}._check_str_based_finish",
        "relies",
        "a stop string that matched is the request's own object, which NaN logits' is not",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT",
        "relies",
        "how a request says that it was given up",
    ),
    Attachment(
        "sglang.srt.managers.schedule_batch.FINISH_MATCHED_STR",
        "relies",
        "how a request says which string ended it",
    ),
)


def ended_well(req: Any) -> bool:
    """Whether a finished request's output becomes part of its session's transcript."""
    reason = req.finished_reason
    return reason is not None and not isinstance(reason, FINISH_ABORT) and not logits_broke(req)


def logits_broke(req: Any) -> bool:
    """Whether a request finished because its logits were not numbers.

    SGLang reports that as a matched stop string, "NaN happened", which a client may ask for too.
    They are told apart by identity: a stop string that really matched is one of the request's own
    objects, and no client can make an object of its request be a constant of SGLang's code.
    """
    reason = req.finished_reason
    if not isinstance(reason, FINISH_MATCHED_STR) or reason.matched != _NAN_MARK:
        return False
    return not any(reason.matched is stop for stop in req.sampling_params.stop_strs or ())
