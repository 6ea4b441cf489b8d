"""Stop strings on a real server, generated in other tokens than their own encoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from bench.harness.server import Server

pytestmark = pytest.mark.server

STOP = "information"
REGEX = f"= {STOP} of all"
UNSEEN = 5
"""Tokens of an answer of which at least three spell the stop string: its encoding is one."""
SEEDS = range(8)
WILD = {"temperature": 100, "regex": REGEX, "stop": [STOP]}
"""So hot that every token which spells the text is about as likely: it comes in small pieces."""


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        yield client
        assert client.get("/health").status_code == 200


Answer = tuple[str, str, int]
"""Text, finish reason, generated tokens."""


def on_a_session(http: httpx.Client, seed: int) -> Answer:
    session = http.post("/v1/sessions", json={}).raise_for_status().json()["id"]
    sampling = {**WILD, "max_tokens": 60, "seed": seed}
    body = {"text": "Go.", "sampling": sampling}
    reply = http.post(f"/v1/sessions/{session}/append", json=body).raise_for_status().json()
    return reply["text"], reply["finish_reason"], reply["usage"]["generated_tokens"]


def on_a_session_as_a_stream(http: httpx.Client, seed: int) -> Answer:
    session = http.post("/v1/sessions", json={}).raise_for_status().json()["id"]
    sampling = {**WILD, "max_tokens": 60, "seed": seed}
    body = {"text": "Go.", "sampling": sampling, "stream": True}
    stream = http.post(f"/v1/sessions/{session}/append", json=body).raise_for_status().text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    written = "".join(event.get("text", "") for event in events[:-1])
    assert written == events[-1]["text"]
    return written, events[-1]["finish_reason"], events[-1]["usage"]["generated_tokens"]


def generate(http: httpx.Client, seed: int, drafts: str) -> Answer:
    params = {
        **WILD,
        "max_new_tokens": 60,
        "sampling_seed": seed,
        "custom_params": {"draft": drafts},
    }
    body = {"text": "Go.", "sampling_params": params}
    reply = http.post("/generate", json=body).raise_for_status().json()
    meta = reply["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": STOP}
    return reply["text"], "stop", meta["completion_tokens"]


def generate_with_drafts(http: httpx.Client, seed: int) -> Answer:
    return generate(http, seed, "on")


def generate_without_drafts(http: httpx.Client, seed: int) -> Answer:
    return generate(http, seed, "off")


def chat(http: httpx.Client, seed: int) -> Answer:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Go."}],
        **WILD,
        "temperature": 2,
        "max_tokens": 60,
        "seed": seed,
    }
    reply = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    choice = reply["choices"][0]
    tokens = reply["usage"]["completion_tokens"]
    return choice["message"]["content"], choice["finish_reason"], tokens


@pytest.mark.parametrize(
    "ask",
    [on_a_session, on_a_session_as_a_stream, generate_with_drafts, generate_without_drafts, chat],
)
def test_a_stop_string_that_comes_in_pieces_ends_the_answer(
    http: httpx.Client, ask: Callable[[httpx.Client, int], Answer]
) -> None:
    answers = [ask(http, seed) for seed in SEEDS]
    assert {(text, finish) for text, finish, _ in answers} == {("= ", "stop")}
    assert max(tokens for _, _, tokens in answers) >= UNSEEN


def pieces_of(http: httpx.Client, *texts: str) -> list[list[int]]:
    """The tokens of each text, as the server's tokenizer encodes it."""
    return [
        http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
        .raise_for_status()
        .json()["tokens"]
        for text in texts
    ]


@pytest.mark.parametrize("drafts", ["on", "off"])
def test_a_stop_string_spelled_letter_by_letter_ends_the_answer(
    http: httpx.Client, drafts: str
) -> None:
    parts = [STOP[at : at + size] for size in range(2, len(STOP) + 1) for at in range(len(STOP))]
    long = {ids[0] for ids in pieces_of(http, *set(parts)) if len(ids) == 1}
    letters = {ids[0] for ids in pieces_of(http, *STOP)}
    params: dict[str, Any] = {
        "temperature": 0,
        "regex": f"{STOP} of all",
        "stop": [STOP],
        "max_new_tokens": 60,
        "logit_bias": {str(token): -1e9 for token in long - letters},
        "custom_params": {"draft": drafts},
    }
    body = {"text": f"{STOP} {STOP} ", "sampling_params": params}
    reply = http.post("/generate", json=body).raise_for_status().json()
    assert reply["text"] == ""
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": STOP}
    assert len(reply["output_ids"]) == len(STOP)
