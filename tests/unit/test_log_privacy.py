"""A session id is all it takes to go on with a session: none reaches a log."""

from __future__ import annotations

import logging
from array import array
from typing import Any

import pytest
import uvicorn

from stateful_sglang.api import access_log
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.service.engine import TurnRequest
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.session.ids import digest
from stateful_sglang.session.rank import RankSessions, TurnRefusedError

prepare()

from sglang.srt.utils.request_logger import (  # noqa: E402 - SGLang imports only after prepare()
    _dataclass_to_string_truncated,
    _transform_data_for_logging,
)

from stateful_sglang.runtime.sessions.manager import TurnInput, TurnOrigin  # noqa: E402

SECRET = "q7Xw_sEcReT-bearer-id-01"


@pytest.mark.parametrize(
    "target",
    [
        f"/v1/sessions/{SECRET}",
        f"/v1/sessions/{SECRET}/append",
        f"/v1/sessions/{SECRET}?x=1",
        f"/v1/tree?session_id={SECRET}",
        f"/v1/tree?limit=3&session_id={SECRET}&x=1",
        f"/v1/sessions/{SECRET.replace('-', '%2D')}/append",
        f"/v1/sessions?limit=2&after={SECRET}",
    ],
)
def test_the_access_log_names_a_session_by_its_digest(target: str) -> None:
    uvicorn.Config("app:app")  # configures its loggers, as a server's start does
    access_log.install()
    uvicorn.Config("app:app")
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("uvicorn.access")
    handler = Lines()
    logger.addHandler(handler)
    try:
        logger.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "POST", target, "1.1", 200)
    finally:
        logger.removeHandler(handler)
    (line,) = lines
    assert SECRET not in line.replace("%2D", "-")
    assert digest(SECRET) in line


def test_other_targets_are_logged_as_they_are() -> None:
    for target in (
        "/v1/sessions",
        "/v1/sessions?limit=3",
        "/v1/sessions/import",
        "/v1/chat/completions",
        "/v1/tree",
    ):
        assert access_log.redacted(target) == target


def test_an_id_that_begins_as_a_route_does_is_redacted_too() -> None:
    assert SECRET not in access_log.redacted(f"/v1/sessions/import{SECRET}/events")


def test_a_rank_refuses_a_turn_without_naming_its_session() -> None:
    ranks = RankSessions()
    messages = []
    for _ in range(2):
        with pytest.raises(TurnRefusedError) as refused:
            ranks.begin_turn(SECRET, "rid", 5, array("q", [1]))
        messages.append(str(refused.value))
    ranks.begin_turn(SECRET, "rid", 0, array("q", [1]))
    with pytest.raises(TurnRefusedError) as refused:
        ranks.begin_turn(SECRET, "other", 0, array("q", [1]))
    for message in (*messages, str(refused.value)):
        assert SECRET not in message
        assert digest(SECRET) in message


@pytest.mark.parametrize(
    "written", [_dataclass_to_string_truncated, _transform_data_for_logging, repr]
)
def test_the_request_log_shows_a_turn_without_its_session(written: Any) -> None:
    turn = TurnRequest(SECRET, "rid", 7, array("q", [1]), Sampling())
    for logged in (TurnInput(input_ids=[1], turn=TurnOrigin(turn)), turn):
        if written is repr or isinstance(logged, TurnInput):
            assert SECRET not in str(written(logged))
