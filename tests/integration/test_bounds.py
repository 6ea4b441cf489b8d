"""No number in a request harms a live server: extremes of every numeric field of every data route.

The fields come from the server's own OpenAPI document, so that a new field is tested and a new
route must be listed here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.harness.server import Server
from stateful_sglang.session.bounds import REQUEST, SAMPLING

pytestmark = pytest.mark.server

EXTREMES = (
    0,
    -1,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    2**64,
    1e308,
    -1e308,
    1e-320,
    0.5,
    math.inf,
    math.nan,
)
MAX_DEPTH = 5
"""Steps from a body to a number: deeper down the formats of `response_format` repeat themselves."""
SHORT = {"max_new_tokens": 2, "stop": list("aeiou ")}
"""Two tokens, and where the limit itself is tried, an end at the first vowel."""
CHAT = [{"role": "user", "content": "Say hello."}]
_OPENAI = {"model": "default", "max_tokens": 2, "stop": ["a", "e", "i", "o"]}
_OLLAMA = {"num_predict": 2, "stop": ["a", "e", "i", "o"]}
_OLLAMA_OPTIONS = ("num_predict", "temperature", "top_p", "top_k", "presence_penalty", "seed")

DATA: dict[str, dict[str, Any]] = {
    "/generate": {"text": "Hi", "sampling_params": SHORT},
    "/encode": {"text": "Hi"},
    "/classify": {"text": "Hi"},
    "/v1/completions": {**_OPENAI, "prompt": "Hi"},
    "/v1/chat/completions": {**_OPENAI, "messages": CHAT},
    "/invocations": {**_OPENAI, "messages": CHAT},
    "/v1/embeddings": {"model": "default", "input": "Hi"},
    "/v1/classify": {"model": "default", "input": "Hi"},
    "/tokenize": {"model": "default", "prompt": "Hi"},
    "/v1/tokenize": {"model": "default", "prompt": "Hi"},
    "/detokenize": {"model": "default", "tokens": [1]},
    "/v1/detokenize": {"model": "default", "tokens": [1]},
    "/v1/score": {"query": "Hi", "items": ["a", "b"], "label_token_ids": [1, 2]},
    "/v1/decisions": {"model": "default", "input": "Hi", "questions": []},
    "/v1/systemone": {},
    "/v1/responses": {"model": "default", "input": "Hi", "max_output_tokens": 2},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
    "/v1/messages": {
        "model": "default",
        "max_tokens": 2,
        "messages": CHAT,
        "stop_sequences": ["a", "e", "i", "o"],
    },
    "/v1/messages/count_tokens": {"model": "default", "messages": CHAT},
    "/api/chat": {"model": "default", "messages": CHAT, "stream": False, "options": _OLLAMA},
    "/api/generate": {"model": "default", "prompt": "Hi", "stream": False, "options": _OLLAMA},
    "/vertex_generate": {"instances": [{"text": "Hi"}], "parameters": {"sampling_params": SHORT}},
    "/v1/audio/transcriptions": {},
    "/open_session": {"capacity_of_str_len": 1000},
    "/v1/sessions": {},
    "/v1/sessions/{session_id}": {},
    "/v1/sessions/{session_id}/append": {
        "text": "Hi",
        "sampling": {"max_tokens": 2, "stop": ["a", "e", "i", "o"]},
    },
    "/v1/sessions/{session_id}/generate": {"sampling": {"max_tokens": 2}},
    "/v1/sessions/{session_id}/ingest": {"messages": CHAT},
    "/v1/sessions/{session_id}/fork": {},
    "/v1/sessions/{session_id}/rollback": {"version": 0},
    "/v1/sessions/{session_id}/edit": {"after": 0, "messages": CHAT},
    "/v1/sessions/{session_id}/touch": {},
    "/v1/sessions/{session_id}/messages": {},
    "/v1/sessions/{session_id}/events": {},
    "/v1/sessions/{session_id}/export": {},
    "/v1/sessions/import": {"session": {"format": "stateful-sglang-session/1"}},
    "/v1/tree": {},
}
"""Routes that take a client's data, and the body into which an extreme is put."""

_CONTROL = "changes the server for everybody: its operator's, not a client's"
_READS = "takes no number"
_STATE = "switches what is recorded or kept of all requests: its operator's"
LEFT_OUT: dict[str, str] = {
    "/": _READS,
    "/abort_request": "takes no number; ends other requests by their id",
    "/v1/prefixes": "takes no number; what it publishes is shared by all",
    "/v1/prefixes/{prefix_id}": "takes no number",
    "/add_external_corpus": _CONTROL,
    "/api/show": _READS,
    "/api/tags": _READS,
    "/begin_weight_update": _CONTROL,
    "/close_session": "takes no number",
    "/configure_logging": _STATE,
    "/continue_generation": _CONTROL,
    "/destroy_weights_update_group": _CONTROL,
    "/dump_expert_distribution_record": _STATE,
    "/dumper/{method}": _STATE,
    "/end_weight_update": _CONTROL,
    "/flush_cache": _CONTROL,
    "/freeze_gc": _CONTROL,
    "/get_hicache_l3_cache_layout": _READS,
    "/get_model_info": _READS,
    "/get_remote_instance_transfer_engine_info": _CONTROL,
    "/get_server_info": _READS,
    "/get_weights_by_name": _CONTROL,
    "/health": _READS,
    "/health_generate": _READS,
    "/hicache/storage-backend": _CONTROL,
    "/hicache/storage-backend/clear": _CONTROL,
    "/init_weights_send_group_for_remote_instance": _CONTROL,
    "/init_weights_update_group": _CONTROL,
    "/is_scaling_elastic_ep": _READS,
    "/list_external_corpora": _READS,
    "/load_lora_adapter": _CONTROL,
    "/load_lora_adapter_from_tensors": _CONTROL,
    "/metrics": _READS,
    "/model_info": _READS,
    "/parse_function_call": _READS,
    "/pause_generation": _CONTROL,
    "/pd_role_switch": _CONTROL,
    "/ping": _READS,
    "/ready": _READS,
    "/release_memory_occupation": _CONTROL,
    "/remote_instance_transfer_engine_info": _CONTROL,
    "/remove_external_corpus": _CONTROL,
    "/resume_memory_occupation": _CONTROL,
    "/scale_elastic_ep": _CONTROL,
    "/send_weights_to_remote_instance": _CONTROL,
    "/separate_reasoning": _READS,
    "/server_info": _READS,
    "/set_internal_state": _CONTROL,
    "/set_trace_level": _STATE,
    "/slow_down": _CONTROL,
    "/start_expert_distribution_record": _STATE,
    "/start_profile": _STATE,
    "/stop_expert_distribution_record": _STATE,
    "/stop_profile": _STATE,
    "/unload_lora_adapter": _CONTROL,
    "/update_weight_version": _CONTROL,
    "/update_weights_from_disk": _CONTROL,
    "/update_weights_from_distributed": _CONTROL,
    "/update_weights_from_ipc": _CONTROL,
    "/update_weights_from_tensor": _CONTROL,
    "/v1/loads": _READS,
    "/v1/models": _READS,
    "/v1/models/{model}": _READS,
    "/v1/responses/{response_id}": _READS,
    "/v1/responses/{response_id}/cancel": _READS,
    "/weights_checker": _CONTROL,
}

Path = tuple[str | int, ...]


class Field(NamedTuple):
    """A number of a route: where it goes in the body, or which parameter of the query it is."""

    route: str
    path: Path
    place: str = "body"


def fields_of(document: dict[str, Any]) -> list[Field]:
    """Every numeric field of every data route, SGLang's free-form mappings included."""
    fields: dict[Field, None] = {}
    for route in DATA.keys() & document["paths"].keys():
        for operation in document["paths"][route].values():
            for parameter in operation.get("parameters", ()):
                if any(True for _ in _numbers(parameter["schema"], document, ())):
                    fields[Field(route, (parameter["name"],), "query")] = None
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                place = "body" if kind == "application/json" else "form"
                for path in _numbers(content["schema"], document, ()):
                    fields[Field(route, path, place)] = None
    inner: list[tuple[str, Path]] = [("/generate", ("sampling_params",))]
    inner.append(("/vertex_generate", ("parameters", "sampling_params")))
    for route, at in inner:
        fields |= dict.fromkeys(Field(route, (*at, *path)) for path in _sampling_paths())
    for name in _OLLAMA_OPTIONS:
        for route in ("/api/chat", "/api/generate"):
            fields[Field(route, ("options", name))] = None
    fields |= dict.fromkeys(
        Field("/vertex_generate", ("parameters", name))
        for name in sorted(REQUEST.keys() - {"dimensions", "embed_override_token_id"})
    )
    for name in ("session_params", "video_config", "images_config"):
        fields[Field("/generate", (name, "offset" if name == "session_params" else "n"))] = None
    return sorted(fields, key=str)


def _sampling_paths() -> Iterator[Path]:
    for name in sorted(SAMPLING):
        match name:
            case "stop_token_ids":
                yield (name, 0)
            case "logit_bias":
                yield (name, "5")
            case "custom_params":
                yield (name, "thinking_budget")
            case _:
                yield (name,)


def _numbers(
    schema: Any, document: dict[str, Any], path: Path, seen: tuple[str, ...] = ()
) -> Iterator[Path]:
    if not isinstance(schema, dict) or len(path) > MAX_DEPTH:
        return
    if (reference := schema.get("$ref")) is not None:
        if reference not in seen:
            target: Any = document
            for part in reference.removeprefix("#/").split("/"):
                target = target[part]
            yield from _numbers(target, document, path, (*seen, reference))
        return
    if schema.get("type") in ("integer", "number"):
        yield path
    for kind in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(kind, ()):
            yield from _numbers(each, document, path, seen)
    for name, each in schema.get("properties", {}).items():
        yield from _numbers(each, document, (*path, name), seen)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _numbers(schema["additionalProperties"], document, (*path, "5"), seen)
    if isinstance(schema.get("items"), dict):
        yield from _numbers(schema["items"], document, (*path, 0), seen)


def body_with(base: Any, path: Path, value: Any) -> Any:
    """The base body with a value at a path; what is missing on the way is made."""
    if not path:
        return value
    key, *rest = path
    if isinstance(key, int):
        return [body_with(base[0] if isinstance(base, list) and base else None, tuple(rest), value)]
    whole = dict(base) if isinstance(base, dict) else {}
    whole[key] = body_with(whole.get(key), tuple(rest), value)
    return whole


class Prober:
    """Sends extremes to one server and says what it did not survive."""

    def __init__(self, server: Server) -> None:
        # No connection is used twice: the server may have closed it after an error.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=server.url, timeout=120, trust_env=False, limits=limits)
        self.document: dict[str, Any] = self.client.get("/openapi.json").json()
        self.fields = fields_of(self.document)
        self.statuses: dict[int, int] = {}

    def send(self, field: Field, value: Any) -> str | None:
        """Send one extreme, and say what was wrong with the answer: none, or a 5xx that no
        document explains."""
        for method in ("post", "get"):
            if method in self.document["paths"][field.route]:
                break
        route = field.route
        if "{session_id}" in route:
            session = self.client.post("/v1/sessions", json={}).json()["id"]
            route = route.replace("{session_id}", session)
        sent: dict[str, Any] = {}
        if field.place == "query":
            sent["params"] = {field.path[0]: str(value)}
        elif field.place == "form":
            sent["data"] = {str(field.path[0]): str(value)}
            sent["files"] = {"file": ("a.wav", b"RIFF")}
        else:
            body = body_with(DATA[field.route], field.path, value)
            sent["content"] = json.dumps(body)
            sent["headers"] = {"Content-Type": "application/json"}
        told = f"{method.upper()} {route} {sent}"
        try:
            response = self.client.request(method, route, **sent)
        except httpx.TransportError as error:
            pytest.fail(f"{told}: {error!r}")
        self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
        if response.status_code < 500 or response.status_code in (501, 503):
            return None
        return f"{told}: {response.status_code} {response.text[:300]}"

    def send_all(self, cases: Iterable[tuple[Field, Any]]) -> None:
        """Send many; fails with everything that was wrong."""
        problems = [found for case in cases if (found := self.send(*case)) is not None]
        assert not problems, "\n".join(problems)

    def check_alive(self) -> None:
        """The server still generates, on SGLang's route and on ours."""
        body = {"text": "Hi", "sampling_params": {"max_new_tokens": 1}}
        assert self.client.post("/generate", json=body).status_code == 200
        session = self.client.post("/v1/sessions", json={}).json()["id"]
        append = {"text": "Hi", "sampling": {"max_tokens": 1}}
        assert self.client.post(f"/v1/sessions/{session}/append", json=append).status_code == 200
        assert self.client.delete(f"/v1/sessions/{session}").status_code == 200


@pytest.fixture(scope="module")
def prober(server: Server) -> Iterator[Prober]:
    prober = Prober(server)
    with closing(prober.client):
        yield prober
        print("statuses:", dict(sorted(prober.statuses.items())))


def test_every_route_is_tested_or_left_out_with_a_reason(prober: Prober) -> None:
    routes = prober.document["paths"].keys()
    assert not DATA.keys() & LEFT_OUT.keys()
    assert routes - DATA.keys() - LEFT_OUT.keys() == set()
    assert {each for each in routes if "sessions" in each or each == "/v1/tree"} <= DATA.keys()


def test_each_numeric_field_survives_an_extreme(prober: Prober) -> None:
    assert len(prober.fields) > 150
    prober.send_all(zip(prober.fields, itertools.cycle(EXTREMES), strict=False))
    prober.check_alive()


def test_what_ended_the_scheduler_once_is_refused_by_name(prober: Prober) -> None:
    for body, named in (
        ({"top_k": 2**31}, "top_k"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, "min_new_tokens"),
        ({"logit_bias": {"5": 1e308}}, "logit_bias"),
        ({"stop_token_ids": [2**31], "min_new_tokens": 1}, "stop_token_ids"),
        ({"stream_interval": 0}, "stream_interval"),
    ):
        sent = {"text": "Hi", "sampling_params": {**SHORT, **body}}
        response = prober.client.post("/generate", json=sent)
        assert response.status_code == 400
        assert named in response.text
    for ids in ([10**9], [-1]):
        response = prober.client.post("/generate", json={"input_ids": ids})
        assert response.status_code == 400
        assert "input_ids[0]" in response.text
    chat = {**DATA["/v1/chat/completions"], "top_k": 2**31}
    response = prober.client.post("/v1/chat/completions", json=chat)
    assert response.status_code == 400
    assert "top_k" in response.text
    session = prober.client.post("/v1/sessions", json={}).json()["id"]
    append = {"text": "Hi", "sampling": {"top_k": 2**31}}
    response = prober.client.post(f"/v1/sessions/{session}/append", json=append)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "sampling.top_k"
    prober.check_alive()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_number_in_any_field_is_answered(prober: Prober, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(prober.fields))
    value = data.draw(st.one_of(st.sampled_from(EXTREMES), st.integers(), st.floats()))
    assert prober.send(field, value) is None


def test_the_server_generates_after_all_of_it(prober: Prober) -> None:
    prober.check_alive()


@pytest.mark.slow
def test_each_numeric_field_survives_every_extreme(prober: Prober) -> None:
    prober.send_all(itertools.product(prober.fields, EXTREMES))
    prober.check_alive()
