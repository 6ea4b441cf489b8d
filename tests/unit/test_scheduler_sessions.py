"""A rank's sessions at its scheduler: how turns end there, and what a refused one is told."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.schedule_batch import (  # noqa: E402 - SGLang comes after prepare()
    FINISH_MATCHED_STR,
    Req,
)
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.runtime.sessions import scheduler as runtime  # noqa: E402


class Streamer:
    """SGLang's output streamer: what it sends, in the form in which it is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def stream_output(self, reqs: list[Req], _return_logprob: bool) -> None:
        self.sent += [req.finished_reason.to_json() for req in reqs if req.finished()]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> runtime.SchedulerSessions:
    tree = SimpleNamespace(bind_sessions=lambda _: None, release_session_leaf=lambda _: None)
    config = SimpleNamespace(vocab_size=100)
    sessions = runtime.SchedulerSessions(
        SimpleNamespace(
            tree_cache=tree,
            draft_worker=None,
            model_config=config,
            tokenizer=None,
            output_streamer=Streamer(),
        )
    )
    monkeypatch.setattr(runtime, "_bound", sessions)
    return sessions


def finish(rank: runtime.SchedulerSessions, rid: str, stops: list[str], mark: str) -> Any:
    """End a request with a matched stop string and give back what was sent of it."""
    sampling = SamplingParams(max_new_tokens=8)
    sampling.stop_strs = stops
    req = Req(rid, "", array("q", [1, 2]), sampling, vocab_size=100)
    req.output_ids.extend([3, 4])
    req.finished_reason = FINISH_MATCHED_STR(matched=mark)
    streamer = Streamer()
    runtime._end_finished(Streamer.stream_output, streamer, [req], False)
    (sent,) = streamer.sent
    return sent


def mark() -> str:
    """A new object with the text by which SGLang tells broken logits."""
    return " ".join(["NaN", "happened"])


def test_broken_logits_end_a_turn_as_an_error_and_keep_nothing(
    rank: runtime.SchedulerSessions,
) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    sent = finish(rank, "r1", [mark()], mark())
    assert (sent["type"], sent["status_code"], sent["err_type"]) == ("abort", 500, "broken")
    assert list(rank.ranks.begin_turn("s", "r2", 0, array("q", [9]))) == [9]


def test_a_stop_string_of_the_same_text_ends_a_turn_well(rank: runtime.SchedulerSessions) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    stop = mark()
    assert finish(rank, "r1", [stop], stop) == {"type": "stop", "matched": "NaN happened"}
    assert list(rank.ranks.begin_turn("s", "r2", 4, array("q", [9]))) == [1, 2, 3, 4, 9]


def test_a_request_without_a_session_ends_as_sglang_says(rank: runtime.SchedulerSessions) -> None:
    assert finish(rank, "plain", [], mark()) == {"type": "stop", "matched": "NaN happened"}


def test_a_refused_turn_is_told_its_kind_and_no_secret(
    rank: runtime.SchedulerSessions, caplog: pytest.LogCaptureFixture
) -> None:
    def append(rid: str, base_len: int) -> dict[str, Any]:
        request = SimpleNamespace(
            stateful_session="a-secret-id",
            rid=rid,
            base_len=base_len,
            input_ids=array("q", [1]),
            sampling_params=SamplingParams(max_new_tokens=8),
            stream=True,
            http_worker_ipc=None,
            time_stats=None,
        )
        rank.append(request)
        return rank._scheduler.output_streamer.sent[-1]

    stale = append("r1", 5)
    assert (stale["status_code"], stale["err_type"]) == (409, "stale_base")
    rank.ranks.begin_turn("a-secret-id", "r2", 0, array("q", [1]))
    busy = append("r3", 0)
    assert (busy["status_code"], busy["err_type"]) == (409, "busy")
    assert "turn rejected" in caplog.text
    assert "a-secret-id" not in caplog.text + stale["message"] + busy["message"]
