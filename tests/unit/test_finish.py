"""Ends of a turn as SGLang says them, in the words of the engine port."""

from __future__ import annotations

from typing import Any

import pytest

from stateful_sglang.runtime.sessions.finish import finish_of
from stateful_sglang.service.engine import EngineError, Finish
from stateful_sglang.session.rank import BusySessionError, StaleBaseError


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        (None, None),
        ({"type": "stop", "matched": 2}, Finish("stop", 2)),
        ({"type": "stop", "matched": "NaN happened"}, Finish("stop", "NaN happened")),
        ({"type": "stop"}, Finish("stop")),
        ({"type": "length", "length": 7}, Finish("length")),
    ],
)
def test_a_good_end_says_why_it_stopped(reason: Any, finish: Finish | None) -> None:
    assert finish_of(reason, constrained=False) == finish


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ({"type": "abort", "message": "m", "status_code": 400}, "invalid"),
        ({"type": "abort", "message": "m", "status_code": 503}, "overloaded"),
        ({"type": "abort", "message": "m", "status_code": 500}, "broken"),
        ({"type": "abort", "message": "m", "status_code": None}, "broken"),
        ({"type": "abort", "message": "m", "status_code": 409}, "conflict"),
        ({"type": "abort", "status_code": 409, "err_type": StaleBaseError.kind}, "stale_base"),
        ({"type": "abort", "status_code": 409, "err_type": BusySessionError.kind}, "busy"),
        ({"type": "abort", "status_code": 500, "err_type": "InternalServerError"}, "broken"),
        (
            {
                "type": "abort",
                "message": "Out of memory even after retracting all other requests in the decode "
                "batch. Aborting the last request.",
                "status_code": 500,
            },
            "out_of_memory",
        ),
        (
            {
                "type": "abort",
                "message": "Retracted under decode memory pressure without a KV backup. Retry "
                "later.",
                "status_code": 503,
            },
            "out_of_memory",
        ),
        (
            {
                "type": "abort",
                "message": "Request prompt exceeds the KV memory budget: input_len=9.",
                "status_code": 400,
                "err_type": "BadRequestError",
            },
            "invalid",
        ),
        ({"type": "new in the next release"}, "broken"),
    ],
)
def test_a_bad_end_is_an_error_of_its_kind(reason: Any, kind: str) -> None:
    with pytest.raises(EngineError) as ended:
        finish_of(reason, constrained=True)
    assert (ended.value.kind, ended.value.field) == (kind, None)
    assert ended.value.message


@pytest.mark.parametrize(
    "message",
    [
        "Failed to compile regex grammar: too much",
        "Grammar preprocessing timed out",
        "Grammar-based generation (json_schema, regex, ebnf) is not supported",
    ],
)
def test_a_refused_constraint_is_named_where_there_is_one(message: str) -> None:
    reason = {"type": "abort", "message": message, "status_code": 400}
    for constrained, field in ((True, "constraint"), (False, None)):
        with pytest.raises(EngineError) as refused:
            finish_of(reason, constrained=constrained)
        assert (refused.value.kind, refused.value.field) == ("invalid", field)
