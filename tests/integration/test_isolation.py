"""A real server with two tenants and an administrator: what each reaches, and what it does not."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench.harness import http
from bench.harness.server import Server, serve
from stateful_sglang.api.guard.routes import OPEN, Access, access
from stateful_sglang.tenants import keys_file

pytestmark = pytest.mark.server

PROMPT = " ".join(f"The {number}th line of a long prompt says nothing new." for number in range(60))
BRIEF = {"max_new_tokens": 1, "temperature": 0}
LONG = {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 0}
FOREIGN = "https://evil.example"
ADMINISTRATIVE = (
    "/flush_cache",
    "/slow_down",
    "/metrics",
    "/v1/tree",
    "/v1/loads",
    "/server_info",
    "/get_server_info",
    "/update_weights_from_disk",
    "/load_lora_adapter",
    "/open_session",
    "/set_internal_state",
    "/configure_logging",
    "/start_profile",
    "/pause_generation",
    "/openapi.json",
)


class Tenants(NamedTuple):
    """A server and who uses it."""

    server: Server
    keys: Path
    acme: httpx.Client
    bolt: httpx.Client
    ops: httpx.Client
    secrets: tuple[str, ...]
    """All that no log may show."""


@pytest.fixture(scope="module")
def tenants(
    tmp_path_factory: pytest.TempPathFactory, server_arguments: list[str]
) -> Iterator[Tenants]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {name: keys_file.add(path, name, admin=name == "ops")[1] for name in NAMES}
    salts = [tenant.salt for tenant in keys_file.read(path).tenants.values()]
    with serve(*server_arguments, "--keys", str(path), "--session-ttl-s", "7200") as server:
        clients = [_client(server, keys[name]) for name in NAMES]
        with closing(clients[0]), closing(clients[1]), closing(clients[2]):
            yield Tenants(server, path, *clients, secrets=(*keys.values(), *salts))


NAMES = ("acme", "bolt", "ops")


def _client(server: Server, key: str) -> httpx.Client:
    client = http.client(server.url, timeout_s=120)
    client.headers["authorization"] = f"Bearer {key}"
    return client


def cached(client: httpx.Client, prompt: Any, **fields: Any) -> list[int]:
    """Tokens of each prompt whose KV was found."""
    reply = client.post("/generate", json={"text": prompt, "sampling_params": BRIEF, **fields})
    assert reply.status_code == 200, reply.text
    answers = reply.json()
    answers = answers if isinstance(answers, list) else [answers]
    return [each["meta_info"]["cached_tokens"] for each in answers]


def test_kv_is_found_inside_a_tenant_and_by_no_other(tenants: Tenants) -> None:
    assert cached(tenants.acme, PROMPT)[0] == 0
    assert cached(tenants.acme, PROMPT)[0] > 400
    assert cached(tenants.bolt, PROMPT)[0] == 0
    assert cached(tenants.bolt, PROMPT)[0] > 400
    assert cached(tenants.ops, PROMPT)[0] == 0


def test_sessions_that_name_no_time_to_live_have_the_servers(tenants: Tenants) -> None:
    opened = [tenants.acme.post("/v1/sessions", json=body).json() for body in ({}, {"ttl_s": 60})]
    assert [each["ttl_s"] for each in opened] == [7200, 60]


def test_a_clients_own_salt_narrows_and_never_widens(tenants: Tenants) -> None:
    prompt = f"Salted. {PROMPT}"
    assert cached(tenants.acme, prompt)[0] == 0
    salt = keys_file.read(tenants.keys).tenants["acme"].salt
    assert cached(tenants.bolt, prompt, cache_salt=salt)[0] == 0
    assert cached(tenants.bolt, prompt, extra_key=salt)[0] == 0
    assert cached(tenants.acme, prompt, cache_salt="mine")[0] == 0
    assert cached(tenants.acme, prompt, cache_salt="mine")[0] > 400
    assert cached(tenants.bolt, prompt, cache_salt="mine")[0] == 0
    assert cached(tenants.acme, prompt)[0] > 400


def test_batches_are_kept_apart_alike(tenants: Tenants) -> None:
    batch = [f"{letter}. {PROMPT}" for letter in "AB"]
    assert cached(tenants.acme, batch, cache_salt=["x", ""]) == [0, 0]
    assert min(cached(tenants.acme, batch, cache_salt=["x", ""])) > 400
    assert cached(tenants.bolt, batch, cache_salt=["x", ""]) == [0, 0]
    first, second = cached(tenants.acme, batch)
    assert first == 0
    assert second > 400


def test_a_chat_in_openais_form_is_kept_apart_too(tenants: Tenants) -> None:
    """The route says nothing of what was cached; a `/generate` of the same tokens does."""
    prompt = f"Completion. {PROMPT}"
    body = {"model": "default", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    assert tenants.acme.post("/v1/completions", json=body).status_code == 200
    assert cached(tenants.bolt, prompt)[0] == 0
    assert cached(tenants.acme, prompt)[0] > 400


def turn(client: httpx.Client, session: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": text}],
        "sampling": {"max_tokens": 4, "temperature": 0},
        **fields,
    }
    reply = client.post(f"/v1/sessions/{session}/append", json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def opened(client: httpx.Client, **fields: Any) -> str:
    reply = client.post("/v1/sessions", json=fields)
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


def test_a_session_of_another_tenant_is_not_there(tenants: Tenants) -> None:
    session = opened(tenants.acme, metadata={"job": "secret"})
    turn(tenants.acme, session, "hello", idempotency_key="once")
    path = f"/v1/sessions/{session}"
    message = {"messages": [{"role": "user", "content": "hello"}]}
    for other in (tenants.bolt, tenants.ops):
        tries = [
            other.get(path),
            other.get(f"{path}/messages"),
            other.get(f"{path}/export"),
            other.get(f"{path}/events"),
            other.post(f"{path}/append", json=message),
            other.post(f"{path}/append", json={**message, "idempotency_key": "once"}),
            other.post(f"{path}/append", json={**message, "ephemeral": True}),
            other.post(f"{path}/generate", json={}),
            other.post(f"{path}/ingest", json=message),
            other.post(f"{path}/fork", json={}),
            other.post(f"{path}/rollback", json={"version": 0}),
            other.post(f"{path}/edit", json={"after": 0}),
            other.post(f"{path}/touch", json={}),
            other.delete(path),
        ]
        assert [reply.status_code for reply in tries] == [404] * len(tries)
        assert session not in other.get("/v1/sessions", params={"limit": 1000}).text
    assert tenants.acme.get(path).json()["version"] == 1
    assert session in tenants.acme.get("/v1/sessions").text


def test_sessions_find_kv_inside_their_tenant_and_by_no_other(tenants: Tenants) -> None:
    system = f"A system prompt of its own. {PROMPT}"

    def first_turn(client: httpx.Client) -> int:
        return int(turn(client, opened(client, system=system), "hello")["usage"]["cached_tokens"])

    opening = 20  # tokens with which every conversation of a tenant begins, at most
    assert first_turn(tenants.acme) < opening
    assert first_turn(tenants.acme) > 400
    assert first_turn(tenants.bolt) < opening
    assert first_turn(tenants.bolt) > 400


def test_a_key_of_one_tenant_means_nothing_to_another(tenants: Tenants) -> None:
    ids = [
        client.post("/v1/sessions", json={"idempotency_key": "same"}).json()["id"]
        for client in (tenants.acme, tenants.bolt, tenants.acme)
    ]
    assert ids[0] == ids[2] != ids[1]


def stream(client: httpx.Client, rid: str | None) -> Iterator[dict[str, Any]]:
    """Reports of a long answer, the first one read when this returns."""
    body = {"text": "Once", "sampling_params": LONG, "stream": True}
    body |= {} if rid is None else {"rid": rid}
    with client.stream("POST", "/generate", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("rid", ["job", None])
def test_an_abort_reaches_ones_own_requests_only(tenants: Tenants, rid: str | None) -> None:
    reports = stream(tenants.acme, rid)
    name = next(reports)["meta_info"]["id"]
    assert rid in (None, name)
    for aborted in (name, name[:1], ""):
        assert tenants.bolt.post("/abort_request", json={"rid": aborted}).status_code == 200
    assert tenants.bolt.post("/abort_request", json={"abort_all": True}).status_code == 403
    for _ in range(20):
        assert next(reports)["meta_info"]["finish_reason"] is None
    tenants.acme.post("/abort_request", json={"rid": name})
    last = list(reports)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["id"] == name


def test_a_client_who_leaves_ends_no_request_whose_name_begins_like_its_own(
    tenants: Tenants,
) -> None:
    kept = stream(tenants.acme, "ab")
    next(kept)
    for client in (tenants.acme, tenants.bolt):
        left = stream(client, "a")
        next(left)
        left.close()
    for _ in range(40):
        assert next(kept)["meta_info"]["finish_reason"] is None
    kept.close()


def test_what_reaches_beyond_a_tenant_is_refused(tenants: Tenants) -> None:
    body = {"text": "x", "sampling_params": BRIEF, "session_params": {"id": "x"}}
    reply = tenants.acme.post("/generate", json=body)
    assert reply.status_code == 400
    assert "session_params: not for tenants" in reply.text


@pytest.mark.parametrize("path", ADMINISTRATIVE)
def test_administrative_routes_want_an_administrators_key(tenants: Tenants, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert tenants.acme.request(method, path, json={}).status_code == 403
    with http.client(tenants.server.url) as nobody:
        assert nobody.get(path).status_code == 401


def test_an_administrator_uses_them(tenants: Tenants) -> None:
    for path in ("/server_info", "/openapi.json", "/v1/loads"):
        assert tenants.ops.get(path).status_code == 200
    assert tenants.ops.post("/flush_cache").status_code == 200


def test_every_route_that_the_server_names_is_closed_without_a_key(tenants: Tenants) -> None:
    paths = tenants.ops.get("/openapi.json").json()["paths"]
    assert len(paths) > 60
    with http.client(tenants.server.url) as nobody:
        for path, methods in paths.items():
            filled = re.sub(r"\{[^}]*\}", "x", path)
            for method in methods:
                status = nobody.request(method, filled).status_code
                if path in OPEN:
                    assert status == 200, (method, path)
                    continue
                assert status == 401, (method, path)
                if access(filled) is Access.ADMIN:
                    refused = tenants.acme.request(method, filled)
                    assert refused.status_code == 403, (method, path)


def test_the_warm_up_has_passed_and_probes_need_no_key(tenants: Tenants) -> None:
    with http.client(tenants.server.url) as nobody:
        for path in OPEN:
            assert nobody.get(path).status_code == 200
    log = tenants.server.log.read_text()
    for asked in ("GET /model_info", "POST /generate", "POST /freeze_gc"):
        first = re.search(rf'"{asked} HTTP/1.1" (\d+)', log)
        assert first is not None
        assert first[1] == "200"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/generate", "/flush_cache", "/none"])
def test_pages_of_other_origins_and_foreign_names_are_refused(tenants: Tenants, path: str) -> None:
    for headers, status in (
        ({"origin": FOREIGN}, 403),
        ({"origin": "null"}, 403),
        ({"origin": FOREIGN, "access-control-request-method": "GET"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example"}, 421),
    ):
        for method in ("GET", "POST", "OPTIONS"):
            reply = tenants.ops.request(method, path, headers=headers)
            assert reply.status_code == status
            assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_page_of_the_server_itself_may_use_it(tenants: Tenants) -> None:
    own = {"origin": tenants.server.url, "sec-fetch-site": "same-origin"}
    assert tenants.acme.get("/v1/models", headers=own).status_code == 200


def test_a_websocket_is_refused_like_a_request(tenants: Tenants) -> None:
    asked = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    with http.client(tenants.server.url) as nobody:
        assert nobody.get("/v1/realtime", headers=asked).status_code == 401
    refused = tenants.acme.get("/v1/realtime", headers={**asked, "origin": FOREIGN})
    assert refused.status_code == 403


def test_a_key_made_while_the_server_runs_is_good_and_revoked_is_not(tenants: Tenants) -> None:
    key, secret = keys_file.add(tenants.keys, "late")
    client = _client(tenants.server, secret)
    with closing(client):
        _until(client, 200)
        keys_file.revoke(tenants.keys, key.id)
        _until(client, 401)


def _until(client: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + 60
    while client.get("/v1/models").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_key_and_no_salt_is_in_the_log(tenants: Tenants) -> None:
    log = tenants.server.log.read_text()
    assert "GET /v1/models" in log
    assert not [secret for secret in tenants.secrets if secret in log]
