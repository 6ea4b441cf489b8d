"""A server with drafts says what a server without drafts says, in fewer steps."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from bench.harness.server import Server, serve

pytestmark = pytest.mark.server

CONTEXT = 512
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["read_file", "search"]},
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "start": {"type": "integer"}},
            "required": ["path", "start"],
        },
    },
    "required": ["name", "parameters"],
}
CALL = '{"name": "read_file", "parameters": {"path": "src/main.py", "start": 1}}'
CHAT = (
    "<|im_start|>system\nYou call tools. Answer with one JSON call.<|im_end|>\n"
    f"<|im_start|>user\nRead src/main.py.<|im_end|>\n<|im_start|>assistant\n{CALL}<|im_end|>\n"
    "<|im_start|>user\nRead src/util.py.<|im_end|>\n<|im_start|>assistant\n"
)
REPEAT = "red green blue red green blue red green"
STORY = "Once upon a time there was a"

REQUESTS: dict[str, dict[str, Any]] = {
    "call": {"text": CHAT, "max_new_tokens": 40},
    "repetition": {"text": REPEAT, "max_new_tokens": 48},
    "story": {"text": STORY, "max_new_tokens": 48},
    "one token": {"text": REPEAT, "max_new_tokens": 1},
    "two tokens": {"text": REPEAT, "max_new_tokens": 2},
    "stop string inside a draft": {"text": REPEAT, "max_new_tokens": 48, "stop": ["blue red"]},
    "schema": {"text": CHAT, "max_new_tokens": 60, "json_schema": json.dumps(SCHEMA)},
    "schema without a pattern": {
        "text": STORY,
        "max_new_tokens": 60,
        "json_schema": json.dumps(SCHEMA),
    },
    "repetition penalty": {"text": REPEAT, "max_new_tokens": 24, "repetition_penalty": 1.2},
    "frequency penalty": {"text": REPEAT, "max_new_tokens": 24, "frequency_penalty": 0.4},
    "at least so many tokens": {"text": CHAT, "max_new_tokens": 48, "min_new_tokens": 40},
    "bias": {"text": REPEAT, "max_new_tokens": 24, "logit_bias": {"216": -3.0}},
    "to the context limit": {"text": REPEAT, "max_new_tokens": CONTEXT - 16, "ignore_eos": True},
}


def ask(client: httpx.Client, request: dict[str, Any], **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, **request}
    body = {"text": sampling.pop("text"), "sampling_params": sampling, **more}
    reply: dict[str, Any] = client.post("/generate", json=body).raise_for_status().json()
    return reply


def battery(server: Server) -> dict[str, dict[str, Any]]:
    """Every request alone, all of them at once, and one with log-probabilities."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        found = {name: ask(client, request) for name, request in REQUESTS.items()}
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            together = pool.map(lambda request: ask(client, request), REQUESTS.values())
            found |= {f"{name}, in a batch": r for name, r in zip(REQUESTS, together, strict=True)}
        found["log-probabilities"] = ask(
            client, REQUESTS["repetition"], return_logprob=True, top_logprobs_num=3
        )
    return found


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, dict[str, Any]]]:
    # Float32, for equal tokens; and seventeen drafts: more than SGLang's rows leave room for.
    common = ("--dtype", "float32", "--context-length", str(CONTEXT))
    found = {}
    chosen = ("--draft", "suffix", "--eviction-policy", "lru")
    with serve(*common, "--max-draft", "17", *chosen) as server:
        found["drafts"] = battery(server)
        tree = httpx.get(f"{server.url}/v1/tree", timeout=60).raise_for_status().json()
        found["drafts"]["tree"] = tree
    with serve(*common, "--draft", "off") as server:
        found["plain"] = battery(server)
        found["plain"]["log"] = {"text": server.log.read_text()}
    return found


@pytest.mark.parametrize("name", [n for name in REQUESTS for n in (name, f"{name}, in a batch")])
def test_greedy_output_equals_plain_decoding(answers: Any, name: str) -> None:
    drafted, plain = answers["drafts"][name], answers["plain"][name]
    assert drafted["text"] == plain["text"]
    assert drafted["output_ids"] == plain["output_ids"]
    assert drafted["meta_info"]["finish_reason"] == plain["meta_info"]["finish_reason"]
    counts = [a["meta_info"]["completion_tokens"] for a in (drafted, plain)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["call", "repetition", "to the context limit"])
def test_repetition_takes_fewer_steps(answers: Any, name: str) -> None:
    meta = answers["drafts"][name]["meta_info"]
    assert meta["completion_tokens"] - 1 > 1.5 * meta["spec_verify_ct"]


def test_the_tree_evicts_by_the_policy_that_was_asked_for(answers: Any) -> None:
    assert answers["drafts"]["tree"]["eviction_policy"] == "lru"


def test_every_decode_step_is_counted(answers: Any) -> None:
    meta = answers["drafts"]["repetition penalty"]["meta_info"]
    assert meta["spec_verify_ct"] == meta["completion_tokens"] - 1


def test_output_under_a_schema_validates(answers: Any) -> None:
    call = json.loads(answers["drafts"]["schema"]["text"])
    assert call["name"] in ("read_file", "search")
    assert isinstance(call["parameters"]["start"], int)


def test_log_probabilities_equal_plain_decodings(answers: Any) -> None:
    drafted, plain = (answers[arm]["log-probabilities"]["meta_info"] for arm in ("drafts", "plain"))
    for (p, token, _), (q, other, _) in zip(
        drafted["output_token_logprobs"], plain["output_token_logprobs"], strict=True
    ):
        assert token == other
        assert p == pytest.approx(q, abs=2e-3)
    for row, other_row in zip(
        drafted["output_top_logprobs"], plain["output_top_logprobs"], strict=True
    ):
        assert [p for p, *_ in row] == pytest.approx([q for q, *_ in other_row], abs=2e-3)


def test_a_server_that_was_not_asked_for_its_log_has_no_line_for_a_request(answers: Any) -> None:
    """Here, because the server that most tests share is asked for it."""
    log = answers["plain"]["log"]["text"]
    assert "Ready after" in log
    assert "INFO: " not in log
