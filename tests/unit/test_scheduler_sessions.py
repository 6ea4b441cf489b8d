"""A rank's sessions at its scheduler: how turns end there, and what a refused one is told."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from prefix_rig import RadixKey, Rig  # noqa: E402
from sglang.srt.managers.schedule_batch import (  # noqa: E402 - SGLang comes after prepare()
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    Req,
)
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.runtime.sessions import scheduler as runtime  # noqa: E402
from stateful_sglang.runtime.sessions.requests import (  # noqa: E402
    PrefixPublishReq,
    PrefixUnpublishReq,
    SessionCloseReq,
    SessionForkReq,
    SessionRollbackReq,
)


class Streamer:
    """SGLang's output streamer: what it sends, in the form in which it is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def stream_output(self, reqs: list[Req], _return_logprob: bool) -> None:
        self.sent += [req.finished_reason.to_json() for req in reqs if req.finished()]


class Record:
    """A tree, or draft indexes: what they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def bind_sessions(self, turn_of: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.told.append((name, *args))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> runtime.SchedulerSessions:
    config = SimpleNamespace(vocab_size=100)
    sessions = runtime.SchedulerSessions(
        SimpleNamespace(
            tree_cache=Record(),
            draft_worker=SimpleNamespace(indexes=Record()),
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
            kind="turn",
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


def ended(rank: runtime.SchedulerSessions, rid: str, reason: Any) -> Req:
    req = Req(rid, "", array("q", [1, 2]), SamplingParams(max_new_tokens=8), vocab_size=100)
    req.output_ids.extend([3, 4])
    req.finished_reason = reason
    runtime._end_finished(Streamer.stream_output, Streamer(), [req], False)
    return req


def test_an_ephemeral_turn_ends_without_a_trace(rank: runtime.SchedulerSessions) -> None:
    rank.ranks.begin_turn("s", "e1", 0, array("q", [1, 2]), "ephemeral")
    req = ended(rank, "e1", FINISH_LENGTH(2))
    assert rank._tree.told == [("bury_turn", req)]
    assert rank._indexes.told == [("forget", "e1")]
    assert "s" not in rank.ranks


def test_a_turn_that_is_given_up_for_lack_of_kv_is_buried_and_dropped(
    rank: runtime.SchedulerSessions,
) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    req = Req("r1", "", array("q", [1, 2]), SamplingParams(max_new_tokens=8), vocab_size=100)
    req.to_finish = FINISH_ABORT("Out of memory")
    runtime._end_aborted(None, req, finished_reason=req.to_finish.to_json())
    assert rank._tree.told == [("bury_turn", req)]
    assert list(rank.ranks.begin_turn("s", "r2", 0, array("q", [9]))) == [9]


def test_a_turn_that_is_kept_is_not_buried(rank: runtime.SchedulerSessions) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    ended(rank, "r1", FINISH_LENGTH(2))
    rank.ranks.begin_turn("s", "p1", 4, array("q", [5]), "prefill")
    ended(rank, "p1", FINISH_LENGTH(0))
    assert rank._tree.told == []
    assert list(rank.ranks.begin_turn("s", "r2", 5, array("q", [9]))) == [1, 2, 3, 4, 5, 9]


def test_a_fork_shares_tokens_and_kv(rank: runtime.SchedulerSessions) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    rank.ranks.finish_turn("r1", [3])
    rank.fork(SessionForkReq(source_session="s", stateful_session="f", length=2))
    assert rank._tree.told == [("fork_session", "s", "f", 2)]
    assert list(rank.ranks.begin_turn("f", "r2", 2, array("q", [9]))) == [1, 2, 9]


@pytest.mark.parametrize(("source", "name"), [("unknown-id", "f"), ("s", "s")])
def test_a_fork_that_cannot_be_had_disturbs_nobody(
    rank: runtime.SchedulerSessions, caplog: pytest.LogCaptureFixture, source: str, name: str
) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    rank.ranks.finish_turn("r1", [3])
    with caplog.at_level("DEBUG"):
        rank.fork(SessionForkReq(source_session=source, stateful_session=name, length=1))
    assert rank._tree.told == []
    assert "was not forked" in caplog.text
    assert "unknown-id" not in caplog.text
    assert list(rank.ranks.begin_turn("s", "r2", 3, array("q", [9]))) == [1, 2, 3, 9]


def test_a_rollback_reaches_tokens_tree_and_drafts(rank: runtime.SchedulerSessions) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    rank.ranks.finish_turn("r1", [3])
    rank.roll_back(SessionRollbackReq(stateful_session="s", length=2))
    assert rank._tree.told == [("truncate_session", "s", 2)]
    assert rank._indexes.told == [("truncate", "s", 2)]
    assert list(rank.ranks.begin_turn("s", "r2", 2, array("q", [9]))) == [1, 2, 9]


def test_closing_during_a_turn_lets_it_go_on_as_one_that_keeps_nothing(
    rank: runtime.SchedulerSessions,
) -> None:
    rank.ranks.begin_turn("s", "r1", 0, array("q", [1, 2]))
    rank.close(SessionCloseReq(stateful_session="s"))
    req = ended(rank, "r1", FINISH_LENGTH(2))
    assert rank._tree.told == [("release_session_leaf", "s"), ("bury_turn", req)]
    assert "s" not in rank.ranks


def test_a_request_of_no_new_tokens_ends_by_length_whatever_was_sampled() -> None:
    for sampled in (0, 2, 7):
        sampling = SamplingParams(max_new_tokens=0, temperature=0.0)
        sampling.normalize(None)
        req = Req("p1", "", array("q", [1, 2]), sampling, vocab_size=100)
        req.eos_token_ids = {2}
        req.tokenizer = None
        req.output_ids.append(sampled)
        req.update_finish_state()
        assert isinstance(req.finished_reason, FINISH_LENGTH)
        assert list(req.output_ids_through_stop) == []
        req.kv.kv_committed_len = 2
        assert req.owned_kv_len() == 2, "the KV of the whole prompt, and no more"


def test_a_prefix_is_published_in_the_tree_and_the_answer_says_what_is_shared() -> None:
    tree = Rig(page_size=4, publish_budget=0.5).tree
    sessions = runtime.SchedulerSessions(SimpleNamespace(tree_cache=tree, draft_worker=None))
    request = PrefixPublishReq(rid="r", prefix_id="p", tokens=list(range(10)))
    answer = sessions.publish(request)
    assert (answer.rid, answer.aligned_tokens, answer.problem) == ("r", 8, None)
    key = RadixKey(array("q", range(12)), cache_salt="a")
    assert tree._publishing.key(key).open_len == 8
    sessions.unpublish(PrefixUnpublishReq(prefix_id="p"))
    assert tree._publishing.key(key).open_len == 0
    short = PrefixPublishReq(rid="s", prefix_id="q", tokens=[1, 2])
    assert "shorter than a page" in str(sessions.publish(short).problem)
