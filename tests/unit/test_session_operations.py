"""Every operation on a session over HTTP: its route, its form, and each way in which it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from engine_double import EngineDouble
from failing_journal import FailingJournal
from fastapi import FastAPI
from session_server import app_of, service_of

from stateful_sglang.api.errors import STATUS
from stateful_sglang.api.native.routes import build_router
from stateful_sglang.service.commands import Caller

pytestmark = pytest.mark.anyio

ROUTE = "/v1/sessions"
USER = {"role": "user", "content": "hello"}
TOOL = {
    "type": "function",
    "function": {"name": "search", "description": "d", "parameters": {"type": "object"}},
}
CALLS = "".join(
    f'<tool_call>{{"name": "search", "arguments": {{"q": "{each}"}}}}</tool_call>' for each in "ab"
)


class Rig:
    """A client without sockets, over a service whose engine and journal are doubles."""

    def __init__(self, **limits: Any) -> None:
        self.engine, self.journal = EngineDouble(), FailingJournal()
        self.service = service_of(self.engine, self.journal, **limits)
        transport = httpx.ASGITransport(app_of(self.engine, service=self.service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def open(self, **fields: Any) -> str:
        return (await self.ok("POST", "", fields, status=201))["id"]

    async def append(self, session: str, **fields: Any) -> dict[str, Any]:
        return await self.ok("POST", f"/{session}/append", {"messages": [USER], **fields})

    async def ok(
        self, method: str, path: str, body: Any = None, status: int = 200, **query: Any
    ) -> dict[str, Any]:
        answer = await self.http.request(
            method, f"/v1/sessions{path}", json=body, params=query or None
        )
        assert answer.status_code == status, answer.text
        return answer.json()

    async def error(self, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        """The error of a request that fails, checked against the table of statuses."""
        answer = await self.http.request(
            method, f"/v1/sessions{path}", json=body, params=query or None
        )
        error = answer.json()["error"]
        assert answer.status_code == STATUS[error["type"]]
        assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503))
        assert error["message"]
        return error


@asynccontextmanager
async def rig_of(**limits: Any) -> AsyncIterator[Rig]:
    rig = Rig(**limits)
    async with rig.http:
        yield rig


async def test_a_session_is_kept_as_it_was_opened_and_touched() -> None:
    async with rig_of() as rig:
        asked = {"ttl_s": 60, "retention": "reserved", "priority": -3, "private": True}
        session = await rig.open(**asked, metadata={"who": "me"})
        view = await rig.ok("GET", f"/{session}")
        assert {name: view[name] for name in asked} == asked
        assert (view["state"], view["forked_from"]) == ("open", None)
        touched = await rig.ok("POST", f"/{session}/touch", {"ttl_s": 5, "metadata": {"a": "b"}})
        assert (touched["ttl_s"], touched["metadata"]) == (5, {"a": "b"})
        assert (touched["priority"], touched["private"]) == (-3, True)
        assert touched["used_at"] >= view["used_at"]


async def test_generating_answers_what_was_ingested() -> None:
    async with rig_of() as rig:
        session, twin = await rig.open(), await rig.open()
        ingested = await rig.ok("POST", f"/{session}/ingest", {"messages": [USER]})
        assert ingested == {
            "id": session,
            "version": 1,
            "pending": 1,
            "missing": [],
            "ready_tokens": ingested["ready_tokens"],
            "computed_tokens": ingested["computed_tokens"],
        }
        assert ingested["ready_tokens"] > 0
        turn = await rig.ok("POST", f"/{session}/generate", {})
        assert turn["version"] == 2
        assert turn["text"] == (await rig.append(twin))["text"]


async def test_results_of_tools_come_in_any_order_and_are_read_in_that_of_the_calls() -> None:
    async with rig_of() as rig:
        session = await rig.open(tools=[TOOL])
        rig.engine.script = CALLS
        turn = await rig.append(session)
        rig.engine.script = None
        first, second = (call["id"] for call in turn["message"]["tool_calls"])

        async def result(call: str, text: str) -> dict[str, Any]:
            message = {"role": "tool", "tool_call_id": call, "content": text}
            return await rig.ok("POST", f"/{session}/ingest", {"messages": [message]})

        early = await result(second, "the second")
        assert (early["missing"], early["ready_tokens"]) == ([first], 0)
        late = await result(first, "the first")
        assert (late["missing"], late["pending"]) == ([], 2)
        await rig.ok("POST", f"/{session}/generate", {})
        said = await rig.ok("GET", f"/{session}/messages")
        assert [each["content"] for each in said["messages"][2:4]] == ["the first", "the second"]
        assert said["messages"][1]["tool_calls"] == turn["message"]["tool_calls"]


async def test_messages_of_a_version_can_be_sent_again() -> None:
    async with rig_of() as rig:
        session = await rig.open(system="S", messages=[USER])
        before = await rig.ok("GET", f"/{session}/messages")
        assert before == {
            "id": session,
            "version": 0,
            "system": "S",
            "messages": [],
            "pending": [USER],
            "raw": False,
        }
        turn = await rig.append(session)
        await rig.append(session)
        said = await rig.ok("GET", f"/{session}/messages", version=1)
        assert said["messages"] == [USER, USER, turn["message"]]
        twin = await rig.open(system=said["system"], messages=said["messages"])
        assert (await rig.ok("GET", f"/{twin}/messages"))["pending"] == said["messages"]
        error = await rig.error("GET", f"/{session}/messages", version=9)
        assert (error["type"], error["version"]) == ("unknown_version", 2)
        error = await rig.error("GET", f"/{session}/messages", version="new")
        assert (error["type"], error["param"]) == ("invalid_request", "version")


async def test_a_fork_has_the_past_and_its_own_future() -> None:
    async with rig_of() as rig:
        source = await rig.open(metadata={"a": "b"}, private=True)
        await rig.append(source)
        await rig.append(source)
        fork = await rig.ok("POST", f"/{source}/fork", {"version": 1}, status=201)
        assert fork["forked_from"] == {"id": source, "version": 1}
        assert (fork["version"], fork["metadata"], fork["private"]) == (1, {"a": "b"}, True)
        other = await rig.ok("POST", f"/{source}/fork", {"priority": 2}, status=201)
        assert (other["version"], other["priority"], other["private"]) == (2, 2, True)
        turn = await rig.append(fork["id"])
        assert turn["version"] == 2
        assert (
            turn["text"] == (await rig.ok("GET", f"/{source}/messages"))["messages"][-1]["content"]
        )
        error = await rig.error("POST", f"/{source}/fork", {"version": 7})
        assert (error["type"], error["param"]) == ("unknown_version", "version")


async def test_a_rollback_goes_back_and_the_numbers_go_on() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        await rig.append(session)
        second = await rig.append(session)
        assert (await rig.ok("POST", f"/{session}/rollback", {"version": 1}))["version"] == 1
        again = await rig.append(session)
        assert (again["version"], again["text"]) == (3, second["text"])
        error = await rig.error("POST", f"/{session}/rollback", {"version": 8})
        assert error["type"] == "unknown_version"
        error = await rig.error("POST", f"/{session}/rollback", {})
        assert (error["type"], error["param"]) == ("invalid_request", "version")
        mismatch = {"version": 1, "expected_version": 2}
        error = await rig.error("POST", f"/{session}/rollback", mismatch)
        assert (error["type"], error["version"]) == ("version_mismatch", 3)


async def test_an_edit_puts_messages_in_the_place_of_turns() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        for _ in range(3):
            await rig.append(session)
        summary = {"role": "user", "content": "in short"}
        body = {"after": 0, "through": 2, "messages": [summary]}
        assert (await rig.ok("POST", f"/{session}/edit", body))["version"] == 4
        said = await rig.ok("GET", f"/{session}/messages")
        assert said["pending"][0] == summary
        assert len(said["pending"]) == 3
        assert (await rig.ok("POST", f"/{session}/rollback", {"version": 3}))["messages"] == 6
        dropped = await rig.ok("POST", f"/{session}/edit", {"after": 1})
        assert (dropped["version"], dropped["messages"]) == (5, 2)
        error = await rig.error("POST", f"/{session}/edit", {"after": 3, "through": 1})
        assert (error["type"], error["param"]) == ("invalid_request", "through")
        error = await rig.error("POST", f"/{session}/edit", {"after": 17})
        assert (error["type"], error["param"]) == ("unknown_version", "after")


async def test_an_ephemeral_turn_leaves_the_session_as_it_was() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        await rig.append(session)
        before = await rig.ok("GET", f"/{session}")
        title = await rig.append(session, ephemeral=True, idempotency_key="title")
        after = await rig.ok("GET", f"/{session}")
        assert (title["version"], after["tokens"]) == (1, before["tokens"])
        assert await rig.append(session, ephemeral=True, idempotency_key="title") == title


async def test_lists_are_paged_and_filtered() -> None:
    async with rig_of() as rig:
        ids = [await rig.open(metadata={"n": str(n % 2), "x:y": "z"}) for n in range(5)]
        page = await rig.ok("GET", "", limit=2)
        assert (page["total"], page["next"]) == (5, page["sessions"][-1]["id"])
        seen = [each["id"] for each in page["sessions"]]
        while page["next"] is not None:
            page = await rig.ok("GET", "", limit=2, after=page["next"])
            seen += [each["id"] for each in page["sessions"]]
        assert sorted(seen) == sorted(ids)
        odd = await rig.ok("GET", "", metadata=["n:1"])
        assert {each["id"] for each in odd["sessions"]} == {ids[1], ids[3]}
        assert (await rig.ok("GET", "", metadata=["n:1", "x:other"]))["total"] == 0
        await rig.ok("DELETE", f"/{ids[0]}")
        assert (await rig.ok("GET", ""))["total"] == 4
        assert (await rig.ok("GET", "", state="closed"))["sessions"][0]["state"] == "closed"
        assert (await rig.ok("GET", "", state="any"))["total"] == 5
        for query in ({"metadata": ["n"]}, {"state": "gone"}, {"limit": 0}, {"after": "x" * 65}):
            error = await rig.error("GET", "", **query)
            assert (error["type"], error["param"]) == ("invalid_request", *query)


async def test_closing_may_erase() -> None:
    async with rig_of() as rig:
        session, other = await rig.open(), await rig.open()
        closed = await rig.ok("DELETE", f"/{session}", erase="true")
        assert closed == {"id": session, "version": 0, "closed": True, "erased": True}
        await rig.ok("DELETE", f"/{other}")
        assert rig.journal.erased == [session]
        assert (await rig.error("DELETE", f"/{session}"))["type"] == "session_not_found"
        error = await rig.error("DELETE", f"/{other}", erase="perhaps")
        assert (error["type"], error["param"]) == ("invalid_request", "erase")


async def test_an_export_goes_on_elsewhere_token_for_token() -> None:
    async with rig_of() as rig, rig_of() as elsewhere:
        session = await rig.open(system="S", tools=[TOOL], metadata={"a": "b"}, ttl_s=60)
        rig.engine.script = CALLS
        await rig.append(session)
        rig.engine.script = None
        await rig.append(session, messages=[{**USER, "name": "me"}])
        await rig.ok("POST", f"/{session}/rollback", {"version": 1})
        exported = await rig.ok("GET", f"/{session}/export")
        imported = await elsewhere.ok("POST", "/import", {"session": exported}, status=201)
        assert (imported["version"], imported["metadata"]) == (1, {"a": "b"})
        assert (await elsewhere.append(imported["id"]))["text"] == (await rig.append(session))[
            "text"
        ]
        assert elsewhere.engine.prompts[-1] == rig.engine.prompts[-1]
        old = await rig.ok("GET", f"/{session}/messages", version=2)
        kept = await elsewhere.ok("GET", f"/{imported['id']}/messages", version=2)
        assert kept == old | {"id": imported["id"]}


async def test_a_session_of_another_model_is_taken_only_where_that_is_accepted() -> None:
    async with rig_of() as rig, rig_of() as elsewhere:
        session = await rig.open()
        await rig.append(session)
        body = {"session": await rig.ok("GET", f"/{session}/export"), "idempotency_key": "k"}
        elsewhere.engine.model_digest = "another"
        error = await elsewhere.error("POST", "/import", body)
        assert (error["type"], error["model"]) == ("other_model", rig.engine.model_digest)
        body["accept_other_model"] = True
        imported = await elsewhere.ok("POST", "/import", body, status=201)
        assert imported["version"] == imported["tokens"] == 0
        assert await elsewhere.ok("POST", "/import", body, status=201) == imported


async def broken_exports() -> list[tuple[dict[str, Any], str]]:
    async with rig_of() as rig:
        session = await rig.open(tools=[TOOL])
        await rig.append(session)
        whole = await rig.ok("GET", f"/{session}/export")
    first, last = whole["commits"]
    return [
        ({**whole, "format": "other/1"}, "session.format"),
        ({**whole, "options": {"ttl_s": "long"}}, "session.options.ttl_s"),
        ({**whole, "options": {"metadata": {"a": 1}}}, "session.options.metadata.a"),
        ({**whole, "commits": []}, "session.commits"),
        ({**whole, "version": 9}, "session.version"),
        ({**whole, "created_at": None}, "session.created_at"),
        ({**whole, "commits": [first, {**last, "tokens": "?"}]}, "session.commits[1].tokens"),
        ({**whole, "commits": [first, {**last, "base_len": 7}]}, "session.commits[1].base_len"),
        (
            {**whole, "commits": [first, {**last, "messages": [{"role": "x"}]}]},
            "session.commits[1].messages[0].role",
        ),
        (
            {**whole, "commits": [first, {**last, "messages": [{"role": "user"}]}]},
            "session.commits[1].messages[0].content",
        ),
        ({name: each for name, each in whole.items() if name != "model"}, "session.model"),
    ]


async def test_what_is_no_exported_session_is_422_naming_the_field() -> None:
    async with rig_of() as rig:
        for exported, param in await broken_exports():
            error = await rig.error("POST", "/import", {"session": exported})
            assert (error["type"], error["param"]) == ("invalid_request", param)
        assert (await rig.ok("GET", "", state="any"))["total"] == 0


KEYED = [
    ("", {}, {"system": "S"}),
    ("/{id}/append", {"messages": [USER]}, {"text": "x"}),
    ("/{id}/generate", {}, {"sampling": {"max_tokens": 2}}),
    ("/{id}/ingest", {"messages": [USER]}, {"messages": [USER, USER]}),
    ("/{id}/fork", {}, {"version": 1}),
    ("/{id}/rollback", {"version": 0}, {"version": 1}),
    ("/{id}/edit", {"after": 0}, {"after": 1}),
]


@pytest.mark.parametrize(("path", "body", "other"), KEYED)
async def test_a_key_does_a_request_once_and_no_other(path: str, body: Any, other: Any) -> None:
    async with rig_of() as rig:
        session = await rig.open(messages=[USER])
        path = path.format(id=session)
        sent = [
            await rig.http.post(f"/v1/sessions{path}", json={**body, "idempotency_key": "k"})
            for _ in range(2)
        ]
        assert sent[0].is_success
        assert sent[0].json() == sent[1].json()
        version = (await rig.ok("GET", f"/{session}"))["version"]
        error = await rig.error("POST", path, {**other, "idempotency_key": "k"})
        assert (error["type"], error["param"]) == ("idempotency_key_reused", "idempotency_key")
        assert (await rig.ok("GET", f"/{session}"))["version"] == version


async def test_a_replayed_turn_says_so_in_a_header() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        body = {"messages": [USER], "idempotency_key": "k"}
        path = f"/v1/sessions/{session}/append"
        first, again = [await rig.http.post(path, json=body) for _ in range(2)]
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert first.json() == again.json()
        streamed = await rig.http.post(path, json={**body, "stream": True})
        assert streamed.headers["idempotent-replayed"] == "true"
        data = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert json.loads(data[0])["text"] == json.loads(data[-1])["text"] == first.json()["text"]


async def test_a_journal_that_records_nothing_is_507_and_nothing_changes() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        await rig.append(session)
        rig.journal.broken = "the disk is full"
        for path, body in (
            ("", {}),
            (f"/{session}/fork", {}),
            (f"/{session}/ingest", {"messages": [USER]}),
            (f"/{session}/rollback", {"version": 0}),
            (f"/{session}/edit", {"after": 0}),
            (f"/{session}/touch", {}),
        ):
            error = await rig.error("POST", path, body)
            assert error["type"] == "journal_failed"
            assert "the disk is full" in error["message"]
        error = await rig.error("POST", f"/{session}/append", {"messages": [USER]})
        assert error["type"] == "commit_failed"
        assert (await rig.error("DELETE", f"/{session}"))["type"] == "journal_failed"
        rig.journal.broken = None
        assert (await rig.ok("GET", f"/{session}"))["version"] == 1


async def test_a_server_about_to_stop_starts_nothing_and_reads_on() -> None:
    async with rig_of() as rig:
        session = await rig.open()
        rig.service.begin_drain()
        for path, body in (
            ("", {}),
            (f"/{session}/append", {"messages": [USER]}),
            (f"/{session}/generate", {}),
            (f"/{session}/ingest", {"messages": [USER]}),
            (f"/{session}/fork", {}),
            (f"/{session}/rollback", {"version": 0}),
            (f"/{session}/edit", {"after": 0}),
        ):
            assert (await rig.error("POST", path, body))["type"] == "draining"
        assert (await rig.ok("GET", f"/{session}"))["state"] == "open"


async def test_what_expired_is_gone_and_what_never_was_is_not_found() -> None:
    async with rig_of(max_sessions=1) as rig:
        session = await rig.open()
        await rig.open()
        for method, path, body in every_route_of_a_session():
            error = await rig.error(method, f"/{session}{path}", body)
            assert (error["type"], error["state"]) == ("session_gone", "expired")
            assert (await rig.error(method, f"/nope{path}", body))["type"] == "session_not_found"


def every_route_of_a_session() -> list[tuple[str, str, Any]]:
    bodies = {
        "append": {"messages": [USER]},
        "ingest": {"messages": [USER]},
        "rollback": {"version": 0},
        "edit": {"after": 0},
    }
    start = "/v1/sessions/{session_id}"
    return [
        (method.upper(), path.removeprefix(start), bodies.get(path.rpartition("/")[2], {}))
        for path, methods in app_of(EngineDouble()).openapi()["paths"].items()
        if path.startswith(start)
        for method in methods
    ]


async def test_a_session_of_another_tenant_is_none() -> None:
    engine = EngineDouble()
    app = FastAPI()
    app.include_router(
        build_router(service_of(engine), lambda request: Caller(request.headers["who"]))
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        mine, theirs = {"who": "me"}, {"who": "them"}
        session = (await http.post(ROUTE, json={}, headers=mine)).json()["id"]
        for method, path, body in every_route_of_a_session():
            found = await http.request(
                method, f"{ROUTE}/{session}{path}", json=body, headers=theirs
            )
            assert (found.status_code, found.json()["error"]["type"]) == (404, "session_not_found")
        assert (await http.get(ROUTE, headers=theirs)).json()["total"] == 0
        assert (await http.get(ROUTE, headers=mine)).json()["total"] == 1


@pytest.mark.parametrize("operation", ["append", "ingest", "rollback", "edit"])
async def test_who_will_not_wait_for_another_is_told_that_it_is_busy(operation: str) -> None:
    bodies = {path.strip("/"): body for _, path, body in every_route_of_a_session()}
    async with rig_of() as rig:
        session = await rig.open()
        rig.engine.pause_after = 1
        running = asyncio.create_task(rig.append(session))
        await rig.engine.paused.wait()
        for how in ({"on_busy": "fail"}, {"wait_s": 0.01}):
            error = await rig.error("POST", f"/{session}/{operation}", bodies[operation] | how)
            assert (error["type"], error["version"]) == ("session_busy", 0)
        rig.engine.go.set()
        assert (await running)["version"] == 1
