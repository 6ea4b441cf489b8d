"""Clients of OpenAI's and Anthropic's routes, on a real server: each request is its delta."""

from __future__ import annotations

import base64
import json
import threading
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from bench.harness import http
from bench.harness.server import Server

pytestmark = pytest.mark.server

PAGE = 1
SYSTEM = "You are a terse assistant of a small library. " * 12


class Reused(NamedTuple):
    """What the answer's header says."""

    match: str
    id: str
    history: int
    delta: int
    messages: int
    divergence: str | None


class Chat:
    """An agent that knows nothing of sessions."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.client, self.model = client, model
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]

    def body(self, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": self.messages,
            "max_tokens": 12,
            "temperature": 0,
            **more,
        }

    def say(self, text: str, **more: Any) -> tuple[dict[str, Any], Reused]:
        self.messages.append({"role": "user", "content": text})
        reply = self.client.post("/v1/chat/completions", json=self.body(**more))
        assert reply.status_code == 200, reply.text
        message = reply.json()["choices"][0]["message"]
        self.messages.append({k: v for k, v in message.items() if v is not None})
        return message, reused(reply)

    def stream(self, text: str) -> tuple[str, Reused]:
        self.messages.append({"role": "user", "content": text})
        said = ""
        with self.client.stream(
            "POST", "/v1/chat/completions", json=self.body(stream=True)
        ) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        said += choice["delta"].get("content") or ""
            found = reused(reply)
        self.messages.append({"role": "assistant", "content": said})
        return said, found


def reused(reply: httpx.Response) -> Reused:
    fields = dict(part.split("=", 1) for part in reply.headers["x-stateful-session"].split("; "))
    counts = (int(fields[name]) for name in ("history", "delta", "messages"))
    return Reused(fields["match"], fields["id"], *counts, fields.get("divergence"))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with http.client(server.url, timeout_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: httpx.Client) -> str:
    return str(client.get("/v1/models").json()["data"][0]["id"])


@pytest.fixture
def chat(client: httpx.Client, model: str) -> Chat:
    return Chat(client, model)


def transcript(client: httpx.Client, session: str) -> list[int]:
    """All tokens of a session that never went back."""
    tokens = array("i")
    for commit in client.get(f"/v1/sessions/{session}/export").json()["commits"]:
        del tokens[commit["base_len"] :]
        tokens.frombytes(base64.b64decode(commit["tokens"]))
    return tokens.tolist()


def continued(client: httpx.Client, prompt: list[int], count: int) -> list[int]:
    """What the model says behind these tokens, asked by them alone."""
    sampling = {"temperature": 0, "max_new_tokens": count}
    reply = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
    return list(reply.json()["output_ids"])


def test_a_chat_client_that_sends_everything_computes_what_is_new(
    client: httpx.Client, chat: Chat
) -> None:
    _, first = chat.say("Name a colour.")
    assert (first.match, first.history) == ("new", 0)
    length = len(transcript(client, first.id))
    for number in range(4):
        if number % 2:
            _, found = chat.stream(f"Name another one, number {number}.")
        else:
            _, found = chat.say(f"Name another one, number {number}.")
        assert (found.match, found.id, found.history) == ("append", first.id, length)
        assert found.delta < 40
        assert found.messages == len(chat.messages) - 2
        length = len(transcript(client, first.id))


def test_its_answers_are_the_models_to_the_same_tokens(
    client: httpx.Client, chat: Chat, server_arguments: list[str]
) -> None:
    if "float32" not in server_arguments:
        pytest.skip("only in float32 does the way that KV was computed make no difference")
    said = []
    for question in ("Name a fruit.", "Is it sweet?", "And a bird?"):
        said.append(chat.say(question))
    tokens = transcript(client, said[0][1].id)
    for message, found in said:
        end = found.history + found.delta
        answer = continued(client, tokens[:end], 12)
        assert tokens[end : end + len(answer)] == answer
        text = client.post("/detokenize", json={"tokens": answer}).json()["text"]
        assert message["content"] in text
    rendered = client.post(
        "/tokenize", json={"messages": chat.messages[:2], "add_generation_prompt": True}
    ).json()
    assert tokens[: said[0][1].delta] == rendered["tokens"]


def test_what_libraries_change_on_the_way_makes_no_difference(
    client: httpx.Client, chat: Chat
) -> None:
    message, first = chat.say("Name a colour.")
    chat.messages[0] = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    chat.messages[1] = {
        "role": "user",
        "content": [{"type": "text", "text": "Name a colour."}],
        "name": "me",
    }
    chat.messages[2] = {
        "role": "assistant",
        "content": f"{message['content']}\n",
        "reasoning_content": "I thought of one.",
        "refusal": None,
        "tool_calls": None,
    }
    _, found = chat.say("And another?")
    assert (found.match, found.id) == ("append", first.id)


def test_an_edited_answer_branches_there_and_says_so(client: httpx.Client, chat: Chat) -> None:
    _, first = chat.say("Name a colour.")
    chat.say("Name a fruit.")
    chat.messages[4] = {"role": "assistant", "content": "Durian."}
    _, found = chat.say("Is it sweet?")
    assert (found.match, found.messages) == ("branch", 3)
    assert found.divergence is not None
    assert found.divergence.startswith("messages[4].content@")
    view = client.get(f"/v1/sessions/{found.id}").json()
    assert view["forked_from"] == {"id": first.id, "version": 1}


def test_two_agents_that_begin_alike_share_a_trunk(
    client: httpx.Client, chat: Chat, model: str
) -> None:
    _, first = chat.say("Name a colour of the evening sky.")
    trunk = len(transcript(client, first.id))
    other = Chat(client, model)
    other.messages = list(chat.messages)
    chat.say("Why?")
    _, found = other.say("Are you sure?")
    assert found.match == "branch"
    path = client.get(f"/v1/tree?session_id={found.id}").json()["path"]
    assert [node["cardinality"] for node in path if node["depth"] <= trunk][-1] == 2
    assert found.history == trunk


def test_a_client_that_leaves_leaves_its_conversation_as_it_was(
    client: httpx.Client, chat: Chat
) -> None:
    _, first = chat.say("Name a colour.")
    length = len(transcript(client, first.id))
    chat.messages.append({"role": "user", "content": "Tell a very long story."})
    body = chat.body(stream=True, max_tokens=600, ignore_eos=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if '"content":"' in line:
                break
    chat.messages.pop()
    _, found = chat.say("And another?")
    assert found.history == length
    assert found.match in ("append", "branch")
    assert found.messages == 3


def test_anthropics_messages_go_on_likewise(client: httpx.Client, model: str) -> None:
    messages: list[dict[str, Any]] = []
    found = []
    for question in ("Name a colour.", "And a fruit?", "And a bird?"):
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        body = {
            "model": model,
            "max_tokens": 12,
            "temperature": 0,
            "system": [
                {"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}},
            ],
            "messages": messages,
        }
        reply = client.post("/v1/messages", json=body)
        assert reply.status_code == 200, reply.text
        found.append(reused(reply))
        messages.append({"role": "assistant", "content": reply.json()["content"]})
    assert [each.match for each in found] == ["new", "append", "append"]
    assert len({each.id for each in found}) == 1
    assert all(each.delta < 40 for each in found[1:])


@pytest.mark.parametrize(
    "change",
    [{"n": 2}, {"return_token_ids": True}, {"rid": "mine"}, {"extra_key": "mine"}],
)
def test_what_no_session_can_serve_is_served_as_ever(
    chat: Chat, client: httpx.Client, change: dict[str, Any]
) -> None:
    chat.messages.append({"role": "user", "content": "Name a colour."})
    reply = client.post("/v1/chat/completions", json=chat.body(**change))
    assert reply.status_code == 200, reply.text
    assert "x-stateful-session" not in reply.headers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 2**31}, "top_k"),
        ({"messages": [{"role": "user", "content": "hi " * 5000}]}, "context length"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "Messages cannot be empty"),
    ],
)
def test_errors_are_the_routes_own(
    chat: Chat, client: httpx.Client, change: dict[str, Any], words: str
) -> None:
    chat.messages.append({"role": "user", "content": "Name a colour."})
    reply = client.post("/v1/chat/completions", json=chat.body(**change))
    assert reply.status_code == 400, reply.text
    assert words in reply.text
    assert reply.json()["object"] == "error"


def test_logprobs_and_usage_are_those_of_the_whole_prompt(chat: Chat, client: httpx.Client) -> None:
    chat.say("Name a colour.")
    chat.messages.append({"role": "user", "content": "Another."})
    body = chat.body(logprobs=True, top_logprobs=2)
    reply = client.post("/v1/chat/completions", json=body).json()
    usage = reply["usage"]
    found = len(reply["choices"][0]["logprobs"]["content"])
    assert found == usage["completion_tokens"]
    assert usage["prompt_tokens"] > 100


def test_a_repeated_request_joins_the_one_that_runs(chat: Chat, client: httpx.Client) -> None:
    chat.messages.append({"role": "user", "content": "Count to a hundred, in words."})
    body = chat.body(max_tokens=200, ignore_eos=True)
    replies: list[httpx.Response] = []

    def post(count: str) -> None:
        headers = {"x-stainless-retry-count": count}
        replies.append(client.post("/v1/chat/completions", json=body, headers=headers))

    threads = [threading.Thread(target=post, args=(count,)) for count in "01"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    one, two = (reply.json() for reply in replies)
    assert one["choices"][0]["message"] == two["choices"][0]["message"]
    assert reused(replies[0]).id == reused(replies[1]).id


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "strict": True,  # Of other tools SGLang binds a call's name alone.
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "maxLength": 8}},
                "required": ["path"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_required_call_is_a_call_and_its_result_goes_on_from_it(chat: Chat) -> None:
    more = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80}
    message, first = chat.say("Read the file a.txt.", **more)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "read_file"
    assert list(json.loads(call["function"]["arguments"])) == ["path"]
    chat.messages.append({"role": "tool", "tool_call_id": call["id"], "content": "It says hello."})
    reply = chat.client.post("/v1/chat/completions", json=chat.body(tools=TOOLS))
    assert reply.status_code == 200, reply.text
    found = reused(reply)
    assert (found.match, found.id, found.messages) == ("append", first.id, 3)
