"""SGLang's own requests by tenant: the ids and salts they run under, and what they may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang import tenants
from stateful_sglang.api import aborts
from stateful_sglang.api.guard.routes import TENANT, Access, access
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.tenants import Identity
from stateful_sglang.tenants.salts import narrowed, request_id

prepare()

from sglang.srt.entrypoints.http_server import app as sglang_app  # noqa: E402
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput  # noqa: E402

from stateful_sglang.runtime import admission, isolation  # noqa: E402
from stateful_sglang.runtime.sessions.engine import TurnInput  # noqa: E402

ACME = Identity("acme", salt="a" * 64)
BOLT = Identity("bolt", salt="b" * 64)
OPS = Identity("ops", admin=True, salt="c" * 64)


class ManagerDouble:
    """What the hooks see of a tokenizer manager; its requests never end."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(vocab_size=100, hidden_size=4)
        self.rid_to_state: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.radix_cache_off = False

    def config_value(self, name: str) -> Any:
        assert name == "disable_radix_cache"
        return self.radix_cache_off

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    async def generate(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """As SGLang's `generate_request`: normalised, noted, and one output for each."""
        obj.normalize_batch_and_arguments()
        rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
        self.rid_to_state |= {rid: SimpleNamespace() for rid in rids}
        isolation._note_owner(None, self, obj, request)
        outputs = [{"text": "", "meta_info": {"id": rid}} for rid in rids]
        yield outputs if isinstance(obj.rid, list) else outputs[0]


def run(manager: ManagerDouble, obj: Any, caller: Identity, request: Any = None) -> Any:
    """The first thing that a request gives its client."""

    async def first() -> Any:
        outputs = admission._checked_request(ManagerDouble.generate, manager, obj, request)
        return await anext(outputs)

    with tenants.acting_as(caller):
        return asyncio.run(first())


def abort(manager: ManagerDouble, rid: str, caller: Identity) -> list[str]:
    with tenants.acting_as(caller):
        isolation.abort_from_outside(manager, rid)
    return manager.aborted


@pytest.mark.parametrize("rid", ["a", "HEALTH_CHECK_1", "0" * 32, "x" * 500, ""])
def test_a_request_runs_under_an_id_of_ours_and_answers_under_its_own(rid: str) -> None:
    manager = ManagerDouble()
    out = run(manager, GenerateReqInput(text="x", rid=rid), ACME)
    assert out["meta_info"]["id"] == rid
    assert list(manager.rid_to_state) == [request_id(ACME.salt, rid)]


def test_two_tenants_may_use_one_name_at_a_time() -> None:
    manager = ManagerDouble()
    for caller in (ACME, BOLT):
        run(manager, GenerateReqInput(text="x", rid="mine"), caller)
    assert len(manager.rid_to_state) == 2


@given(st.lists(st.text(max_size=4), min_size=1, max_size=4, unique=True), st.booleans())
def test_no_id_of_a_running_request_is_the_beginning_of_anothers(
    names: list[str], keyed: bool
) -> None:
    """The scheduler aborts by prefix."""
    manager = ManagerDouble()
    caller = ACME if keyed else tenants.ALONE
    for name in names:
        run(manager, GenerateReqInput(text="x", rid=name), caller)
    run(manager, GenerateReqInput(text=["x"] * 12, rid="batch"), caller)
    run(manager, GenerateReqInput(text="x"), caller)
    ids = list(manager.rid_to_state)
    assert len(ids) == len(names) + 13
    assert not [one for one in ids for other in ids if one != other and other.startswith(one)]


@pytest.mark.parametrize(
    ("rid", "named"), [("r", ["r_0", "r_1"]), (["p", "q"], ["p", "q"]), (None, None)]
)
def test_a_batch_answers_under_the_names_that_sglang_would_give(rid: Any, named: Any) -> None:
    manager = ManagerDouble()
    out = run(manager, GenerateReqInput(text=["x", "y"], rid=rid), ACME)
    found = [each["meta_info"]["id"] for each in out]
    assert found == (named or list(manager.rid_to_state))


def test_several_answers_to_a_named_prompt_are_no_error() -> None:
    params = {"n": 2}
    for text in ("x", ["x", "y"]):
        run(ManagerDouble(), GenerateReqInput(text=text, rid="r", sampling_params=params), ACME)


@pytest.mark.parametrize(
    ("text", "rid"), [("x", ["a"]), (["x", "y"], ["a", "a"]), (["x", "y"], ["a", 1]), ("x", 5)]
)
def test_names_that_fit_no_prompt_are_refused(text: Any, rid: Any) -> None:
    with pytest.raises(admission.RefusedError, match="rid: "):
        run(ManagerDouble(), GenerateReqInput(text=text, rid=rid), ACME)


def test_an_embedding_is_named_alike() -> None:
    manager = ManagerDouble()
    obj = EmbeddingReqInput(text=["x", "y"], rid="r")
    out = run(manager, obj, tenants.ALONE)
    assert [each["meta_info"]["id"] for each in out] == ["r_0", "r_1"]


def test_sglangs_health_request_keeps_the_id_that_the_scheduler_knows_it_by() -> None:
    manager = ManagerDouble()
    request = SimpleNamespace(scope={"path": "/llm/health"})
    obj = GenerateReqInput(input_ids=[0], rid="HEALTH_CHECK_1")
    run(manager, obj, tenants.NOBODY, request)
    assert list(manager.rid_to_state) == ["HEALTH_CHECK_1"]


def test_a_reader_who_leaves_closes_what_sglang_runs() -> None:
    closed: list[bool] = []

    async def outputs() -> AsyncIterator[Any]:
        try:
            yield {"meta_info": {"id": "a"}}
            yield {"meta_info": {"id": "a"}}
        finally:
            closed.append(True)

    async def leave() -> None:
        named = isolation.as_named(outputs(), {"a": "b"})
        assert (await anext(named))["meta_info"]["id"] == "b"
        await named.aclose()

    asyncio.run(leave())
    assert closed == [True]


def test_an_abort_reaches_ones_own_requests_by_either_id() -> None:
    manager = ManagerDouble()
    run(manager, GenerateReqInput(text="x", rid="mine"), ACME)
    inner = request_id(ACME.salt, "mine")
    assert abort(manager, "mine", ACME) == [inner]
    assert abort(manager, inner, ACME) == [inner, inner]
    unnamed = run(manager, GenerateReqInput(text="x"), ACME)["meta_info"]["id"]
    assert abort(manager, unnamed, ACME)[-1] == unnamed


@pytest.mark.parametrize("rid", ["mine", "m", "", request_id(ACME.salt, "mine")])
def test_an_abort_reaches_no_request_of_another_tenant(rid: str) -> None:
    manager = ManagerDouble()
    run(manager, GenerateReqInput(text="x", rid="mine"), ACME)
    assert abort(manager, rid, BOLT) == []


def test_an_administrator_aborts_by_the_id_that_the_server_uses() -> None:
    manager = ManagerDouble()
    run(manager, GenerateReqInput(text="x", rid="mine"), ACME)
    inner = request_id(ACME.salt, "mine")
    assert abort(manager, inner, OPS) == [inner]


def test_a_turn_of_a_session_is_aborted_by_no_tenant_not_even_its_own() -> None:
    """Its session does that: an abort from outside would leave it waiting."""
    manager = ManagerDouble()
    rid = "d" * 32
    run(manager, TurnInput(input_ids=[1], rid=rid, turn=SimpleNamespace()), ACME)
    assert list(manager.rid_to_state) == [rid]
    assert abort(manager, rid, ACME) == []
    assert abort(manager, rid, OPS) == [rid]


@pytest.mark.parametrize(
    "fields",
    [
        {"session_params": {"id": "x"}},
        {"kv_hints": {"a": 1}},
        {"mm_hashes": ["ab"]},
        {"custom_logit_processor": "code"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_reaches_beyond_a_tenant_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    obj = GenerateReqInput(text="x", **fields)
    with tenants.acting_as(ACME):
        problem = isolation.problem(obj, ManagerDouble())
    assert problem is not None
    assert problem.startswith(f"{name}: not for tenants")
    for caller in (OPS, tenants.ALONE, tenants.SERVER):
        with tenants.acting_as(caller):
            assert isolation.problem(obj, ManagerDouble()) is None


def test_embeddings_are_refused_where_their_kv_would_be_shared() -> None:
    manager = ManagerDouble()
    with pytest.raises(admission.RefusedError, match="--disable-radix-cache"):
        run(manager, EmbeddingReqInput(text="x"), ACME)
    run(manager, EmbeddingReqInput(text="x"), tenants.NOBODY)
    manager.radix_cache_off = True
    run(manager, EmbeddingReqInput(text="x"), ACME)


def salt_of(own: str | None, caller: Identity, obj: Any = None) -> str | None:
    tokenized = SimpleNamespace(cache_salt=own)
    with tenants.acting_as(caller):
        isolation._salt(tokenized, None, obj or GenerateReqInput(text="x"))
    return tokenized.cache_salt


def test_a_requests_salt_is_its_tenants_narrowed_by_its_own() -> None:
    assert salt_of(None, ACME) == ACME.salt
    assert salt_of("x", ACME) == narrowed(ACME.salt, "x")
    assert salt_of(ACME.salt, BOLT) not in (ACME.salt, BOLT.salt)
    assert salt_of("x", tenants.ALONE) == "x"
    assert salt_of(None, tenants.ALONE) is None


def test_a_turns_salt_is_the_one_that_its_session_has() -> None:
    turn = TurnInput(input_ids=[1], turn=SimpleNamespace())
    assert salt_of("the session's", ACME, turn) == "the session's"
    assert salt_of(None, ACME, turn) == ACME.salt


def test_the_request_that_sglang_logs_holds_no_salt() -> None:
    obj = GenerateReqInput(text="x", cache_salt="own")
    tokenized = SimpleNamespace(cache_salt=obj.cache_salt)
    with tenants.acting_as(ACME):
        isolation._salt(tokenized, None, obj)
    assert obj.cache_salt == "own"
    assert ACME.salt not in repr(obj)


def _routes(routes: Any) -> Any:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from _routes(inner.routes)
        elif hasattr(route, "path"):
            yield route


LOOKED_AT = {
    "/get_server_info",
    "/server_info",
    "/get_hicache_l3_cache_layout",
    "/open_session",
    "/close_session",
    "/v1/loads",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
}
"""Routes that SGLang keeps for nobody, and that no tenant needs."""


def test_every_route_of_sglang_was_looked_at() -> None:
    """One that is new is closed to tenants; list it where it belongs."""
    unmarked = {
        route.path
        for route in _routes(sglang_app.routes)
        if not hasattr(getattr(route, "endpoint", None), "_auth_level")
    }
    closed = {path for path in unmarked if access(path) is Access.ADMIN}
    assert closed == LOOKED_AT


def test_what_sglang_keeps_for_administrators_is_theirs() -> None:
    kept = {
        route.path
        for route in _routes(sglang_app.routes)
        if hasattr(getattr(route, "endpoint", None), "_auth_level")
    }
    assert "/flush_cache" in kept
    assert {path for path in kept if access(path) is not Access.ADMIN} == {aborts.PATH}


def test_no_route_is_listed_that_is_not_there() -> None:
    served = {route.path for route in _routes(sglang_app.routes)}
    ours = {path for path in TENANT if path.startswith("/v1/sessions")}
    missing = {path for path in TENANT if "{" not in path} - ours - served
    assert missing == set()


def test_the_abort_route_is_ours_and_marked_as_sglangs_was() -> None:
    app = FastAPI()

    async def theirs() -> None:
        raise AssertionError

    theirs._auth_level = "admin"  # type: ignore[attr-defined]
    app.post(aborts.PATH)(theirs)
    aborted: list[str] = []
    aborts.replace_route(app, abort=aborted.append, abort_all=lambda: aborted.append("all"))
    server = TestClient(app)
    for body in ({"rid": "x"}, {"rid": ""}, {"rid": None}, {}, {"abort_all": True}):
        assert server.post(aborts.PATH, json=body).status_code == 200
    assert aborted == ["x", "all"]
    (route,) = [each for each in _routes(app.routes) if each.path == aborts.PATH]
    assert route.endpoint._auth_level == "admin"


def test_a_tenant_ends_no_requests_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "current", lambda: ACME)
    app = FastAPI()
    app.post(aborts.PATH)(lambda: None)
    aborted: list[str] = []
    aborts.replace_route(app, abort=aborted.append, abort_all=lambda: aborted.append("all"))
    reply = TestClient(app).post(aborts.PATH, json={"rid": "x", "abort_all": True})
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "forbidden")
    assert aborted == []
