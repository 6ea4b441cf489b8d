"""The engine bench's rounds and its client, without any engine."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.engines.arms import Arm, ArmUnavailableError, Command, Running, Setting
from bench.engines.comparison import Course, EngineBench
from bench.engines.dialects import LlamaCppDialect, OpenAIDialect, SGLangDialect
from bench.engines.load import MOST_TOKENS, Load, NeverTogetherError, RequestError, Stream
from bench.harness import machine
from bench.harness.limits import Rates
from bench.harness.stats import Arrival
from bench.workloads.cells import decode, prefill

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 1000,
}


class FakeLoad:
    """Answers as an engine would that takes a millisecond a token."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []

    def first_token_s(self, prompt: Sequence[int], slot: int = 0) -> float:
        self.prompts.append(tuple(prompt))
        return len(prompt) / 1000

    def decode_rate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        if len(prompts[0]) > 64:
            filled = set(self.prompts)
            assert all(tuple(prompt) in filled for prompt in prompts)
        return 1000.0


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a bench of fake arms; `loads` has the load of every start."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    loads: list[FakeLoad] = []

    class FakeArm(Arm):
        @contextlib.contextmanager
        def start(self, setting: Setting) -> Iterator[Any]:
            self.command(setting)
            loads.append(FakeLoad())
            yield Running(None, loads[-1])

    def refuse(setting: Setting) -> Command:
        raise ArmUnavailableError("it was never set up")

    fast = FakeArm("fast", "fake", lambda _: Command(()))
    arms = [fast, FakeArm("absent", "fake", refuse)]
    monkeypatch.setattr(machine, "measure", lambda threads: Rates(1e9, 1e9, 1e9))

    def make(**changes: Any) -> EngineBench:
        wanted = {"quick": True, "rounds": 2, "cell_budget_s": 1e9, "lock": tmp_path / "lock"}
        return EngineBench(Setting(tmp_path, tmp_path, 1), arms, Course(**{**wanted, **changes}))

    return make, loads


def test_an_arm_that_cannot_start_is_reported_and_the_others_are_measured(bench) -> None:
    make, loads = bench
    results = make().run()
    assert results.failed == {"absent": "it was never set up"}
    assert len(loads) == 2
    for cell in results.cells:
        measured = results.speed("fast", cell)
        assert (measured is None) == (cell.kind == "verify")
        assert results.speed("absent", cell) is None
    assert results.speed("fast", decode(4, 128)).median == pytest.approx(1000)
    assert results.speed("fast", prefill(512)).median == pytest.approx(1000)
    assert results.speed("fast", prefill(512)).count == 6


def test_no_prompt_is_ever_sent_twice_to_be_prefilled(bench) -> None:
    make, loads = bench
    make().run()
    prompts = [prompt for load in loads for prompt in load.prompts]
    assert len(set(prompts)) == len(prompts)


def test_a_cell_over_its_budget_is_left_out_with_the_reason(bench) -> None:
    make, _ = bench
    results = make(cell_budget_s=1.0).run()
    assert results.speed("fast", decode(16, 128)) is None
    assert "would take about" in results.missing["fast", decode(16, 128)]
    assert results.speed("fast", decode(4, 128)) is not None


def test_prompts_that_take_too_long_are_left_out_before_they_are_sent(bench) -> None:
    make, loads = bench
    results = make(cell_budget_s=1.0).run()
    assert results.speed("fast", prefill(2048)) is None
    assert "a prompt would take about 2 s" in results.missing["fast", prefill(2048)]
    assert results.speed("fast", prefill(128)) is not None
    assert all(len(prompt) < 2048 for load in loads for prompt in load.prompts)


EVENTS = {
    "/generate": [{"meta_info": {"completion_tokens": n}} for n in (1, 2, 4)],
    "/v1/completions": [
        {"usage": {"completion_tokens": 0}},
        {"usage": {"completion_tokens": 1}},
        {"usage": {"completion_tokens": 4}},
    ],
    "/completion": [
        {"tokens": [5], "stop": False},
        {"tokens": [6, 7, 8], "stop": False},
        {"tokens": [], "stop": True, "tokens_predicted": 4},
    ],
}


class _Handler(BaseHTTPRequestHandler):
    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        if body.get("n_predict") == 13:
            self.send_error(500, "no luck")
            return
        self.send_response(200)
        self.end_headers()
        for event in EVENTS[self.path]:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("dialect", [SGLangDialect(), OpenAIDialect("m"), LlamaCppDialect()])
def test_a_stream_is_timed_from_its_first_token_to_its_last(url: str, dialect) -> None:
    (stream,) = Load(url, dialect)._run([([1, 2, 3], 0)], 4)
    assert [arrival.tokens for arrival in stream.arrivals] in ([1, 2, 4], [1, 4])
    assert stream.first_s > 0
    assert [1, 2, 3] in _Handler.seen[-1].values()


def test_a_refused_request_says_so(url: str) -> None:
    with pytest.raises(RequestError, match="500"):
        Load(url, LlamaCppDialect())._run([([1], 0)], 13)


class FastLoad(Load):
    """A server that decodes a token a millisecond.

    Args:
        apart: Milliseconds from the start of a request to that of the next.
        held: Milliseconds for which nothing arrives, and then all of it at once.
    """

    def __init__(self, apart: float, held: float = 0.0) -> None:
        super().__init__("http://fast", SGLangDialect())
        self.apart, self.held = apart, held
        self.asked: list[int] = []

    def _run(self, requests: Sequence[tuple[Sequence[int], int]], tokens: int) -> list[Stream]:
        self.asked.append(tokens)
        begins = [self.apart * number for number in range(len(requests))]
        return [
            Stream(
                at / 1e3,
                [Arrival(max(self.held + n / 100, at + n) / 1e3, n + 1) for n in range(tokens)],
            )
            for at in begins
        ]


def test_streams_over_before_the_last_begins_are_made_longer_until_all_overlap() -> None:
    load = FastLoad(apart=5)
    assert load.decode_rate([[1]] * 16, 40) == pytest.approx(16_000)
    # The last begins 75 ms after the first, and a window of most of the time is wanted.
    assert load.asked == [40, 80, 160, 320, 640]


def test_tokens_that_arrive_all_at_once_are_not_taken_for_a_rate() -> None:
    load = FastLoad(apart=0, held=100)
    assert load.decode_rate([[1]], 40) == pytest.approx(1000, rel=0.25)
    assert load.asked == [40, 80, 160, 320, 640]


def test_the_length_that_was_enough_is_asked_for_at_once_the_next_time() -> None:
    load = FastLoad(apart=5)
    load.decode_rate([[1]] * 16, 40)
    load.decode_rate([[1]] * 16, 40)
    load.decode_rate([[1]], 40)
    assert load.asked[-3:] == [640, 640, 40]


def test_streams_that_overlap_as_they_are_keep_their_length() -> None:
    load = FastLoad(apart=0.1)
    load.decode_rate([[1]] * 16, 40)
    assert load.asked == [40]


def test_a_server_that_takes_one_request_at_a_time_is_told_of() -> None:
    load = FastLoad(apart=10_000)
    with pytest.raises(NeverTogetherError, match="2 streams of 1024 tokens decoded 0"):
        load.decode_rate([[1]] * 2, 40)
    assert load.asked[-1] == MOST_TOKENS


def test_a_cell_whose_streams_never_decode_together_is_left_out_with_the_reason(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(self: FakeLoad, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        if len(prompts) > 4:
            raise NeverTogetherError("one at a time")
        return 1000.0

    monkeypatch.setattr(FakeLoad, "decode_rate", alone)
    make, _ = bench
    results = make().run()
    assert results.missing["fast", decode(16, 128)] == "one at a time"
    assert results.speed("fast", decode(4, 2048)) is not None
    assert "fast" not in results.failed
