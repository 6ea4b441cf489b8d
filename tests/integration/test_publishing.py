"""Real servers with tenants: what is published is shared by all, and what follows it by none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench.harness import http
from bench.harness.server import Server, serve
from stateful_sglang.tenants import keys_file

pytestmark = pytest.mark.server

NAMES = ("acme", "bolt", "ops")
GREEDY = {"max_tokens": 2, "temperature": 0}


class Tenants(NamedTuple):
    """Who uses the server; `ops` is its administrator."""

    acme: httpx.Client
    bolt: httpx.Client
    ops: httpx.Client


@pytest.fixture(scope="module")
def tenants(
    tmp_path_factory: pytest.TempPathFactory, server_arguments: list[str]
) -> Iterator[Tenants]:
    with serving(tmp_path_factory.mktemp("tenants"), server_arguments) as tenants:
        yield tenants


@contextmanager
def serving(folder: Path, arguments: list[str]) -> Iterator[Tenants]:
    """A server with its journal and its keys in a folder, those made if there are none."""
    path = folder / "keys.json"
    known = folder / "known.json"
    if not known.exists():
        made = {name: keys_file.add(path, name, admin=name == "ops")[1] for name in NAMES}
        known.write_text(json.dumps(made))
    keys = json.loads(known.read_text())
    more = ["--keys", str(path), "--journal", str(folder / "journal"), "--enable-cache-report"]
    with serve(*arguments, *more) as server, ExitStack() as stack:
        yield Tenants(*(stack.enter_context(closing(_client(server, keys[n]))) for n in NAMES))


def _client(server: Server, key: str) -> httpx.Client:
    client = http.client(server.url, timeout_s=120)
    client.headers["authorization"] = f"Bearer {key}"
    return client


def lines(about: str, count: int) -> str:
    return " ".join(f"Line {at} of {about} is as long as any other." for at in range(count))


def publish(tenants: Tenants, **body: Any) -> dict[str, Any]:
    reply = tenants.ops.post("/v1/prefixes", json=body)
    assert reply.status_code == 201, reply.text
    published: dict[str, Any] = reply.json()
    return published


def session(client: httpx.Client, system: str) -> str:
    reply = client.post("/v1/sessions", json={"system": system})
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


def turn(client: httpx.Client, session_id: str, said: str) -> dict[str, Any]:
    """A turn of a session: its reply."""
    body = {"messages": [{"role": "user", "content": said}], "sampling": GREEDY}
    reply = client.post(f"/v1/sessions/{session_id}/append", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def chat_cached(client: httpx.Client, system: str, said: str) -> int:
    """Cached tokens of a chat in OpenAI's form."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
    body = {"model": "default", "messages": messages, **GREEDY}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    details = reply.json()["usage"]["prompt_tokens_details"]
    return int((details or {}).get("cached_tokens", 0))


def generate_cached(client: httpx.Client, prompt: str, **fields: Any) -> int:
    """Cached tokens of a prompt on SGLang's own route."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    reply = client.post("/generate", json={"text": prompt, "sampling_params": sampling, **fields})
    assert reply.status_code == 200, reply.text
    return int(reply.json()["meta_info"]["cached_tokens"])


def test_a_published_system_prompt_is_found_by_all_and_what_follows_by_its_tenant_only(
    tenants: Tenants,
) -> None:
    system, said = lines("the system prompt", 40), lines("a question", 40)
    shared = publish(tenants, system=system)["aligned_tokens"]
    assert shared > 300
    first = turn(tenants.acme, session(tenants.acme, system), said)
    other = turn(tenants.bolt, session(tenants.bolt, system), said)
    again = turn(tenants.bolt, session(tenants.bolt, system), said)
    assert first["usage"]["cached_tokens"] == shared
    assert other["usage"]["cached_tokens"] == shared
    assert again["usage"]["cached_tokens"] > shared + 300
    assert first["text"] == other["text"] == again["text"]


def test_sglangs_own_routes_share_it_with_sessions(tenants: Tenants) -> None:
    system, said = lines("the common prompt", 40), lines("one chat", 40)
    shared = publish(tenants, system=system)["aligned_tokens"]
    assert chat_cached(tenants.acme, system, said) == shared
    assert chat_cached(tenants.bolt, system, said) == shared
    assert chat_cached(tenants.bolt, system, said) > shared + 300
    assert turn(tenants.acme, session(tenants.acme, system), "Hello")["usage"][
        "cached_tokens"
    ] in range(shared, shared + 10)


def test_a_clients_own_salt_narrows_behind_what_is_published(tenants: Tenants) -> None:
    head, tail = lines("published text", 40), lines("what follows", 40)
    shared = publish(tenants, text=head)["aligned_tokens"]
    prompt = f"{head} {tail}"
    assert generate_cached(tenants.acme, prompt) == shared
    assert generate_cached(tenants.acme, prompt, cache_salt="mine") == shared
    assert generate_cached(tenants.acme, prompt, cache_salt="mine") > shared + 300
    assert generate_cached(tenants.bolt, prompt, cache_salt="mine") == shared
    assert generate_cached(tenants.bolt, prompt, extra_key="x") == 0


def test_a_session_begun_before_goes_on_and_one_after_the_removal_shares_nothing(
    tenants: Tenants,
) -> None:
    system = lines("a later prompt", 40)
    begun = session(tenants.acme, system)
    # Longer than a page, so that its KV reaches further than what is published.
    assert turn(tenants.acme, begun, lines("a start", 10))["usage"]["cached_tokens"] < 30
    published = publish(tenants, system=system)
    shared = published["aligned_tokens"]
    assert turn(tenants.acme, begun, "And again")["usage"]["cached_tokens"] > shared
    assert turn(tenants.bolt, session(tenants.bolt, system), "Hi")["usage"]["cached_tokens"] == (
        shared
    )
    listed = tenants.ops.get("/v1/prefixes").json()["prefixes"]
    assert published in listed
    assert tenants.ops.delete(f"/v1/prefixes/{published['id']}").status_code == 200
    assert published not in tenants.ops.get("/v1/prefixes").json()["prefixes"]
    assert chat_cached(tenants.ops, system, "Hello") < 30
    assert turn(tenants.acme, begun, "Once more")["usage"]["cached_tokens"] > shared


def test_only_an_administrator_publishes(tenants: Tenants) -> None:
    for method in ("GET", "POST"):
        assert tenants.acme.request(method, "/v1/prefixes", json={"text": "x"}).status_code == 403
    assert tenants.acme.delete("/v1/prefixes/x").status_code == 403
    assert tenants.ops.delete("/v1/prefixes/x").status_code == 404


def test_what_passes_the_budget_is_refused_and_the_server_goes_on(tenants: Tenants) -> None:
    pool = tenants.ops.get("/server_info").json()["max_total_num_tokens"]
    made = []
    for at in range(65):
        reply = tenants.ops.post("/v1/prefixes", json={"input_ids": [1000 + at] * 2000})
        if reply.status_code != 201:
            break
        made.append(reply.json())
    assert reply.status_code == 409, reply.text
    assert reply.json()["error"]["type"] == "publish_refused"
    assert sum(each["aligned_tokens"] for each in made) <= 0.1 * pool
    for each in made:
        assert tenants.ops.delete(f"/v1/prefixes/{each['id']}").status_code == 200
    assert generate_cached(tenants.acme, lines("anything", 5)) < 30


def test_figures_count_what_is_published(tenants: Tenants) -> None:
    before = figures(tenants)
    made = publish(tenants, text=lines("a figure", 20))
    after = figures(tenants)
    assert after["prefixes"] == before["prefixes"] + 1
    assert after["tokens"] == before["tokens"] + made["aligned_tokens"]
    assert tenants.ops.delete(f"/v1/prefixes/{made['id']}").status_code == 200
    assert figures(tenants) == before


def figures(tenants: Tenants) -> dict[str, float]:
    """What the metrics page says of published prefixes."""
    page = tenants.ops.get("/metrics").text
    names = ("prefixes", "tokens")
    return {
        name: float(re.search(rf"^stateful_sglang_published_{name} (\S+)$", page, re.M)[1])  # type: ignore[index]
        for name in names
    }


def test_a_server_that_starts_again_shares_what_was_published_with_its_first_requests(
    tmp_path: Path, server_arguments: list[str]
) -> None:
    system, said = lines("the lasting prompt", 40), lines("a question", 40)
    with serving(tmp_path, server_arguments) as tenants:
        made = publish(tenants, system=system, name="lasting")
        gone = publish(tenants, text=lines("what was removed", 20))
        assert tenants.ops.delete(f"/v1/prefixes/{gone['id']}").status_code == 200
    with serving(tmp_path, server_arguments) as tenants:
        assert tenants.ops.get("/v1/prefixes").json() == {"prefixes": [made]}
        shared = made["aligned_tokens"]
        assert chat_cached(tenants.acme, system, said) < 30, "its KV went with the server"
        assert chat_cached(tenants.bolt, system, said) == shared
        assert turn(tenants.bolt, session(tenants.bolt, system), "Hi")["usage"][
            "cached_tokens"
        ] in range(shared, shared + 10)
        assert publish(tenants, system=system) == made
