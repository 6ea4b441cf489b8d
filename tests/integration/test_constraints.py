"""Constraints on a real server: what is taken, what is refused, and that it lives on."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from bench.harness.server import Server

pytestmark = pytest.mark.server

D7 = "http://json-schema.org/draft-07/schema#"
GREEDY = {"temperature": 0, "max_tokens": 24}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
CHOICE_LOOP = {
    "$ref": "#/$defs/a",
    "$defs": {"a": {"anyOf": [{"type": "string"}, {"allOf": [{"$ref": "#/$defs/a"}]}]}},
}
REMOTE = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        yield client
        assert client.get("/health").status_code == 200


def ask(http: httpx.Client, tools: Any = (), text: str = "Go.", **fields: Any) -> httpx.Response:
    opened = http.post("/v1/sessions", json={"tools": list(tools)})
    if opened.status_code != 201:
        return opened
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return http.post(f"/v1/sessions/{opened.json()['id']}/append", json=body)


def tool(name: str = "act", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("ebnf", 'root ::= root "a"', "sampling.ebnf"),
        ("ebnf", 'root ::= x\nx ::= y "a"\ny ::= root "b"', "sampling.ebnf"),
        ("ebnf", 'root ::= e root "a"\ne ::= "" | e', "sampling.ebnf"),
        ("ebnf", 'root ::= "a" x\nx ::= x "b"', "sampling.ebnf"),
        ("ebnf", "root ::= nowhere", "sampling.ebnf"),
        ("ebnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "sampling.ebnf"),
        ("ebnf", 'root ::= "a"{1000000000}', "sampling.ebnf"),
        ("regex", "(a", "sampling.regex"),
        ("regex", "(?<=a)b", "sampling.regex"),
        ("regex", "a{1000000000}", "sampling.regex"),
        ("json_schema", LOOP, "sampling.json_schema"),
        ("json_schema", CHOICE_LOOP, "sampling.json_schema"),
        ("json_schema", {"$ref": "#"}, "sampling.json_schema"),
        ("json_schema", REMOTE, "sampling.json_schema"),
        ("json_schema", {"type": "nothing"}, "sampling.json_schema"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "sampling.json_schema"),
        ("json_schema", {"type": "string", "pattern": "(a"}, "sampling.json_schema"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "null"}]}, "sampling.json_schema"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": LOOP}},
            "sampling.response_format",
        ),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused_by_its_name(
    http: httpx.Client, field: str, value: Any, param: str, stream: bool
) -> None:
    answer = ask(http, sampling={**GREEDY, field: value}, stream=stream)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("parameters", [LOOP, REMOTE, {"$ref": "#/$defs/gone"}, {"type": "any"}])
def test_a_tool_whose_parameters_are_no_schema_of_its_own_is_refused(
    http: httpx.Client, parameters: Any
) -> None:
    answer = ask(http, [tool("fine"), tool(parameters=parameters)])
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "tools[1].function.parameters"


def test_parameters_that_no_grammar_follows_are_refused_only_where_a_call_is_required(
    http: httpx.Client,
) -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [tool(parameters=unique)]
    assert ask(http, tools, sampling=GREEDY).status_code == 200
    answer = ask(http, tools, tool_choice="required", sampling=GREEDY)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "tools[0].function.parameters"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("function", [{}, {"parameters": None}, {"parameters": {}}])
def test_a_tool_without_parameters_is_called_without_arguments(
    http: httpx.Client, function: Any, stream: bool
) -> None:
    sampling = {"temperature": 0, "max_tokens": 64}
    answer = ask(http, [tool(**function)], tool_choice="required", sampling=sampling, stream=stream)
    assert answer.status_code == 200, answer.text
    reply = answer.json() if not stream else last_event(answer.text)
    assert reply["finish_reason"] == "tool_calls"
    (call,) = reply["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}


def last_event(text: str) -> dict[str, Any]:
    data = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    parsed: dict[str, Any] = json.loads(data[-1])
    return parsed


def test_each_tool_means_its_own_definitions(http: httpx.Client) -> None:
    def parameters(kind: Any) -> dict[str, Any]:
        return {
            "$schema": D7,
            "title": "Parameters",
            "type": "object",
            "properties": {"a": {"$ref": "#/definitions/v", "title": "A"}},
            "required": ["a"],
            "definitions": {"v": kind},
        }

    tools = [
        tool("one", parameters=parameters({"enum": ["left"], "format": "x"})),
        tool("two", parameters=parameters({"const": 7})),
    ]
    for name in ("one", "two"):
        text = f"Call the tool named {name}."
        sampling = {"temperature": 0, "max_tokens": 64}
        reply = ask(http, tools, text, tool_choice="required", sampling=sampling).json()
        (call,) = reply["message"]["tool_calls"]
        expected = {"one": {"a": "left"}, "two": {"a": 7}}[call["function"]["name"]]
        assert json.loads(call["function"]["arguments"]) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"$schema": D7, "title": "T", "type": "string", "format": "x-mine", "maxLength": 3},
        {"$schema": "http://json-schema.org/draft-04/schema#", "id": "http://x.y/z",
         "type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 9},
        {"type": "string", "nullable": True, "maxLength": 3},
        {"type": ["string", "null"], "maxLength": 3},
        {"$schema": D7, "type": "array", "items": [{"type": "boolean"}], "additionalItems": False},
        {"type": "object", "additionalProperties": False, "required": ["v"], "properties": {
            "v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"$defs": {"a/b": {"$anchor": "x", "enum": ["q"]}}, "type": "object",
         "properties": {"k": {"$ref": "#x"}}, "required": ["k"]},
        {"allOf": [{"type": "string"}, {"maxLength": 2}]},
    ],
)  # fmt: skip
def test_a_schema_as_found_in_the_wild_is_followed(http: httpx.Client, schema: Any) -> None:
    from jsonschema.validators import validator_for

    answer = ask(http, sampling={"temperature": 0, "max_tokens": 60, "json_schema": schema})
    assert answer.status_code == 200, answer.text
    if answer.json()["finish_reason"] == "stop":
        value = json.loads(answer.json()["text"])
        assert validator_for(schema)(schema).is_valid(value) or (
            value is None and "nullable" in schema
        )


def test_a_constraint_whose_compilation_would_not_end_is_refused_and_the_next_one_is_taken(
    http: httpx.Client,
) -> None:
    endless = "(" * 8 + "a" + "){1,1000}" * 8
    answer = ask(http, sampling={**GREEDY, "regex": endless})
    assert answer.status_code == 422, answer.text
    assert "multiply to more than" in answer.json()["error"]["message"]
    assert ask(http, sampling={**GREEDY, "regex": "yes|no"}).json()["text"] in ("yes", "no")


def test_left_recursion_that_ends_is_followed(http: httpx.Client) -> None:
    sampling = {**GREEDY, "ebnf": 'root ::= list ";"\nlist ::= list "," item | item\nitem ::= "a"'}
    reply = ask(http, sampling=sampling).json()
    assert reply["text"].replace(",", "").strip("a") in (";", "")


@pytest.mark.parametrize("drafts", ["on", "off"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_end_of_a_grammar_wins_over_min_tokens(
    http: httpx.Client, drafts: str, temperature: int
) -> None:
    sampling = {"temperature": temperature, "max_tokens": 20, "min_tokens": 8, "regex": "ok"}
    for stream in (False, True):
        answer = ask(http, text="ok ok ok ok", sampling=sampling, stream=stream)
        assert answer.status_code == 200, answer.text
        reply = last_event(answer.text) if stream else answer.json()
        assert (reply["text"], reply["finish_reason"]) == ("ok", "stop")
    params = {"temperature": temperature, "max_new_tokens": 20, "min_new_tokens": 8, "regex": "ok"}
    body = {"text": "ok ok ok", "sampling_params": {**params, "custom_params": {"draft": drafts}}}
    plain = http.post("/generate", json=body).json()
    assert (plain["text"], plain["meta_info"]["finish_reason"]["type"]) == ("ok", "stop")


def test_min_tokens_holds_where_the_grammar_allows_more(http: httpx.Client) -> None:
    sampling = {"temperature": 0, "max_tokens": 20, "min_tokens": 8, "regex": "(ok )+"}
    assert ask(http, sampling=sampling).json()["usage"]["generated_tokens"] >= 8
    free = {"temperature": 0, "max_tokens": 20, "min_tokens": 15}
    assert ask(http, sampling=free).json()["usage"]["generated_tokens"] >= 15


@pytest.mark.parametrize("where", ["sampling", "tools"])
def test_a_large_schema_leaves_others_their_answers(server: Server, where: str) -> None:
    waits = asyncio.run(waits_beside_a_large_schema(server.url, where))
    print(f"{where}: {len(waits)} probes, longest wait {max(waits) * 1e3:.1f} ms")
    # Held for half a second, the loop would answer nobody meanwhile.
    assert len(waits) > 10


async def waits_beside_a_large_schema(url: str, where: str) -> list[float]:
    """Seconds that small requests waited while a large schema was taken."""
    properties = {
        f"{where}_property_{i}": {"type": "string", "title": f"Property {i}"} for i in range(2000)
    }
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    opening: dict[str, Any] = {}
    if where == "tools":
        opening = {"tools": [tool(parameters=schema)]}
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        waits: list[float] = []

        async def probe() -> None:
            while True:
                begin = time.perf_counter()
                await http.get("/v1/sessions?limit=1")
                waits.append(time.perf_counter() - begin)

        probing = asyncio.create_task(probe())
        await asyncio.sleep(0.3)
        opened = await http.post("/v1/sessions", json=opening)
        assert opened.status_code == 201, opened.text
        if where == "sampling":
            body = {"text": "Go.", "sampling": {"max_tokens": 4, "json_schema": schema}}
            answer = await http.post(f"/v1/sessions/{opened.json()['id']}/append", json=body)
            assert answer.status_code == 200, answer.text
        probing.cancel()
        return waits


def test_grammars_are_compiled_on_threads_that_give_way(server: Server, http: httpx.Client) -> None:
    answer = ask(http, sampling={**GREEDY, "regex": "gives way|goes first"})
    assert answer.status_code == 200, answer.text
    processes = psutil.Process(server.pid).children(recursive=True)
    (scheduler,) = (each for each in processes if "scheduler" in " ".join(each.cmdline()))
    idle = {
        thread.id
        for thread in scheduler.threads()
        if os.sched_getscheduler(thread.id) == os.SCHED_IDLE
    }
    assert idle
    assert scheduler.pid not in idle
