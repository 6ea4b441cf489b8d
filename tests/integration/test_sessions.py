"""Sessions on a real server with a real model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.harness.server import Server
from bench.suites import exactness
from stateful_sglang import client as frontend
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.session.ids import digest

pytestmark = pytest.mark.server

PAGE = 1
"""Tokens that a turn may compute beyond its delta: the last sampled token's KV is not kept."""
GREEDY = {"temperature": 0, "max_tokens": 12}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a text file of the repository.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "maxLength": 30}},
                "required": ["path"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]


@pytest.fixture
def client(server: Server) -> Iterator[frontend.Client]:
    with frontend.Client(server.url) as client:
        yield client


def test_turns_compute_their_delta_and_no_history(client: frontend.Client) -> None:
    with client.open(system="You are terse.") as session:
        first = session.append("Name a colour.", sampling=GREEDY)
        assert first.usage.history_tokens == 0
        assert first.text
        committed = first.usage.delta_tokens + first.usage.generated_tokens
        for version in range(2, 6):
            turn = session.append(f"Name another one, number {version}.", sampling=GREEDY)
            usage = turn.usage
            assert turn.version == version
            assert usage.history_tokens == committed
            assert usage.delta_tokens <= usage.computed_tokens <= usage.delta_tokens + PAGE
            assert usage.cached_tokens + usage.computed_tokens == committed + usage.delta_tokens
            assert usage.rewound_tokens == 0
            assert 0 < usage.ttft_ms <= usage.total_ms
            committed += usage.delta_tokens + usage.generated_tokens
        assert session.get()["tokens"] == committed


def test_a_stream_says_what_the_reply_says(client: frontend.Client) -> None:
    with client.open() as streamed, client.open() as whole:
        stream = streamed.append("Count to five.", sampling=GREEDY, stream=True)
        pieces = list(stream)
        reply = whole.append("Count to five.", sampling=GREEDY)
        assert "".join(pieces) == stream.turn.text == reply.text
        assert len(pieces) > 1
        assert stream.turn.usage.generated_tokens == reply.usage.generated_tokens


def test_sessions_compute_what_a_model_without_a_cache_computes(
    server: Server, server_arguments: list[str], client: frontend.Client
) -> None:
    """Sessions that share a prompt take turns; `transformers` reads each transcript at once.

    Nothing of the server, and no KV of it, is in the reference: each token that was generated must
    be its most likely one.
    """
    if "float32" not in server_arguments:
        pytest.skip("only in float32 do a server and a reference agree token for token")
    system = "<|im_start|>system\nYou are terse.<|im_end|>\n"
    played = [exactness.Session(client.open(system="You are terse.").id, 3) for _ in range(2)]
    before = dict.fromkeys((each.id for each in played), system)
    questions = ("Name a fruit.", "Is it sweet?", "And a bird?")
    others = ("Name a fruit.", "Is it red?", "Name a colour.")
    for asked in zip(questions, others, strict=True):
        for each, question in zip(played, asked, strict=True):
            turn = client.session(each.id).append(question, sampling=GREEDY, return_output_ids=True)
            new = f"{before[each.id]}<|im_start|>user\n{question}<|im_end|>\n"
            each.transcript += _encode(server, f"{new}<|im_start|>assistant\n")
            start = len(each.transcript)
            each.transcript += turn.output_ids or ()
            each.generated += range(start, len(each.transcript))
            # The template's end of an answer, less what was generated of it.
            before[each.id] = "<|im_end|>\n" if turn.finish_reason == "length" else "\n"
    for each in played:
        assert client.session(each.id).get()["tokens"] == len(each.transcript)
        assert len(each.generated) > 3
        client.session(each.id).close()
    prepare()  # transformers imports only after it
    model = Path(httpx.get(f"{server.url}/model_info", timeout=60).json()["model_path"])
    wrong = [each for each in exactness.compare(model, played) if each.gap >= exactness.TIE]
    assert wrong == []


def test_two_sessions_share_one_system_prompt(client: frontend.Client) -> None:
    system = " ".join(f"Rule {n}: keep item {n * 7} in box {n}." for n in range(110))
    with client.open(system=system) as first:
        cold = first.append("Say yes.", sampling=GREEDY).usage
        assert cold.delta_tokens > 1500
        second = client.open(system=system)
        warm = second.append("Say no, please.", sampling=GREEDY).usage
        assert warm.computed_tokens < 40
        assert warm.cached_tokens > 1480
        shared = [node for node in client.tree(second)["path"] if node["cardinality"] > 1][-1]
        assert (shared["cardinality"], shared["depth"] >= 1480) == (2, True)
        second.close()

        def cardinality() -> int:
            path = client.tree(first)["path"]
            return next(node["cardinality"] for node in path if node["id"] == shared["id"])

        assert _until(cardinality, lambda count: count == 1) == 1


def test_an_aborted_stream_is_as_if_it_had_never_been(client: frontend.Client) -> None:
    def conversation(abort: bool) -> list[str]:
        with client.open(system="You tell stories.") as session:
            texts = [session.append("Begin.", sampling=GREEDY).text]
            if abort:
                long = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
                with session.append("Tell a long one.", sampling=long, stream=True) as stream:
                    next(iter(stream))
                _until(session.get, lambda view: not view["busy"])
                assert session.get()["version"] == 1
            turn = session.append("Now end it.", sampling={**GREEDY, "max_tokens": 32})
            assert turn.usage.computed_tokens <= turn.usage.delta_tokens + PAGE
            return [*texts, turn.text]

    assert conversation(abort=True) == conversation(abort=False)


def test_a_lost_client_leaves_the_session_usable(server: Server, client: frontend.Client) -> None:
    with client.open() as session:
        session.append("Hello.", sampling=GREEDY)
        long = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
        with frontend.Client(server.url, timeout=0.5) as impatient:
            leaving = impatient.session(session.id)
            with pytest.raises(httpx.ReadTimeout):
                leaving.append("Go on for ever.", sampling=long)
        view = _until(session.get, lambda view: not view["busy"])
        assert view["version"] == 1
        assert session.append("Still there?", sampling=GREEDY).version == 2


def test_closing_aborts_what_runs(client: frontend.Client) -> None:
    session = client.open()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            session.append("Go on.", sampling={"max_tokens": 2000, "ignore_eos": True})
        except frontend.ApiError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    _until(session.get, lambda view: view["busy"])
    with pytest.raises(frontend.SessionBusyError) as busy:
        session.append("Me too.", on_busy="fail")
    assert busy.value.version == 0
    session.close()
    thread.join(30)
    assert [type(error) for error in ended] == [frontend.SessionClosedError]
    with pytest.raises(frontend.SessionNotFoundError):
        session.get()


def test_a_required_call_names_a_tool_and_fits_its_schema(client: frontend.Client) -> None:
    with client.open(system="You are a coding agent.", tools=TOOLS) as session:
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": 80}
        turn = session.append("Read README.md.", sampling=asked, tool_choice="required")
        (call,) = turn.tool_calls
        assert turn.finish_reason == "tool_calls"
        assert call.name in ("read_file", "list_files")
        assert set(call.parsed()) == ({"path"} if call.name == "read_file" else set())
        after = session.append(call.result("# The project"), sampling=GREEDY)
        assert after.usage.delta_tokens <= after.usage.computed_tokens
        assert after.usage.computed_tokens <= after.usage.delta_tokens + PAGE


def test_text_and_token_ids_continue_as_they_are(server: Server, client: frontend.Client) -> None:
    with client.open() as by_text, client.open() as by_ids:
        text = "The capital of France is"
        one = by_text.append(text=text, sampling=GREEDY)
        other = by_ids.append(input_ids=_encode(server, text), sampling=GREEDY)
        assert one.text == other.text
        assert one.usage.delta_tokens == other.usage.delta_tokens


def test_stop_strings_and_lengths_end_a_turn(client: frontend.Client) -> None:
    with client.open() as session:
        counted = session.append(
            text="one two three four five six seven eight one two three four five six seven eight"
            " one two three",
            sampling={"temperature": 0, "max_tokens": 30, "stop": [" six"]},
        )
        assert " six" not in counted.text
        assert counted.finish_reason == "stop"
        cut = session.append(text=" and", sampling={"max_tokens": 1})
        assert (cut.finish_reason, cut.usage.generated_tokens) == ("length", 1)


def test_a_stop_string_may_be_called_as_sglang_calls_broken_logits(
    client: frontend.Client,
) -> None:
    with client.open() as session:
        turn = session.append(
            text="NaN happened again. " * 8 + "NaN",
            sampling={"temperature": 0, "max_tokens": 30, "stop": ["NaN happened"]},
        )
        assert (turn.text, turn.finish_reason, turn.version) == (" happened again. ", "stop", 1)


def test_no_session_id_is_in_the_servers_log(
    server: Server, server_arguments: list[str], client: frontend.Client
) -> None:
    if "--log-level-http" not in server_arguments:
        pytest.skip("the server under test writes no access log")
    with client.open() as session:
        session.append("Hello.", sampling={"max_tokens": 1})
        client.tree(session)
        session.get()
        secret = session.id
    with pytest.raises(frontend.SessionNotFoundError):
        client.session(secret).get()

    def log() -> str:
        return server.log.read_text(errors="replace")

    assert f"/v1/sessions/{digest(secret)}" in _until(log, lambda text: digest(secret) in text)
    assert secret not in log()


def test_the_context_is_filled_to_its_end_and_no_further(
    server: Server, client: frontend.Client
) -> None:
    with client.open() as session:
        left = session.get()["tokens_left"]
        with pytest.raises(frontend.ContextLengthError) as full:
            session.append(input_ids=[500] * (left + 1))
        assert full.value.tokens_left == left
        turn = session.append(input_ids=[500] * (left - 7), sampling={"max_tokens": 100})
        assert turn.usage.max_tokens_clipped
        assert turn.usage.generated_tokens <= turn.usage.max_tokens == 8
        assert session.get()["tokens_left"] == max(0, 7 - turn.usage.generated_tokens)
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


BAD_APPENDS: list[tuple[Any, int, str | None]] = [
    (b"{", 422, "body"),
    ({}, 422, "messages"),
    ({"messages": []}, 422, "messages"),
    ({"messages": "hi"}, 422, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "messages[0].role"),
    ({"text": "a", "input_ids": [1]}, 422, "text, input_ids"),
    ({"text": ""}, 422, "text"),
    ({"input_ids": [10**9]}, 422, "input_ids[0]"),
    ({"text": "a", "sampling": {"temperature": -1}}, 422, "sampling.temperature"),
    ({"text": "a", "sampling": {"top_k": 0}}, 422, "sampling.top_k"),
    ({"text": "a", "sampling": {"json_schema": {"type": 1}}}, 422, "sampling.json_schema"),
    ({"text": "a", "tool_choice": "required"}, 422, "tool_choice"),
    ({"text": "a", "expected_version": 9}, 409, "expected_version"),
    ({"input_ids": [500] * 5000}, 413, None),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_APPENDS, ids=range(len(BAD_APPENDS)))
def test_bad_input_is_refused_with_its_status_and_field(
    server: Server, client: frontend.Client, body: Any, status: int, param: str | None
) -> None:
    with client.open() as session:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{server.url}/v1/sessions/{session.id}/append"
        response = httpx.post(url, content=content, timeout=60)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.get("param") == param
        assert session.get()["version"] == 0


def test_unknown_sessions_are_404_on_every_route(server: Server) -> None:
    url = f"{server.url}/v1/sessions/unknown"
    responses = [
        httpx.get(url),
        httpx.delete(url),
        httpx.post(f"{url}/append", json={"text": "x"}),
        httpx.get(f"{server.url}/v1/tree", params={"session_id": "unknown"}),
    ]
    assert [response.status_code for response in responses] == [404] * 4


def test_sglangs_own_routes_and_errors_are_as_they_were(server: Server) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": 5}, timeout=60)
    assert response.status_code == 400
    assert response.json()["object"] == "error"


def _until(read: Any, holds: Any, timeout: float = 30.0) -> Any:
    """What `read` returns as soon as it `holds`, or at the end of the time."""
    end = time.monotonic() + timeout
    while True:
        value = read()
        if holds(value) or time.monotonic() > end:
            return value
        time.sleep(0.02)


def _encode(server: Server, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    reply = httpx.post(f"{server.url}/v1/tokenize", json=body, timeout=60)
    ids: list[int] = reply.raise_for_status().json()["tokens"]
    return ids
