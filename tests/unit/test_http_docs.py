"""docs/http-api.md says what the code does: routes, fields, events, errors and usage figures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from engine_double import EngineDouble
from session_server import app_of

from stateful_sglang.api import errors as api_errors
from stateful_sglang.api.native import changes, prefixes, schemas
from stateful_sglang.api.native.bodies import Body
from stateful_sglang.api.native.message_fields import IGNORED_FIELDS
from stateful_sglang.api.native.writing import NOT_ASKED
from stateful_sglang.service import service as service_module
from stateful_sglang.service.engine import EngineError, ErrorKind
from stateful_sglang.service.failures import turn_failed
from stateful_sglang.service.prefixes import PrefixView
from stateful_sglang.service.results import Usage
from stateful_sglang.session import errors as session_errors

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "http-api.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its two header rows."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None, f"no heading {heading!r}"
    rows = [line for line in match[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def names(heading: str) -> list[str]:
    return [row[0].strip("`") for row in table(heading)]


def test_every_route_is_listed_and_no_other() -> None:
    paths = app_of(EngineDouble()).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert set(names("Routes")) == served


KEPT = "How a session is kept"
TURN = "Taking a turn"


@pytest.mark.parametrize(
    ("model", "headings"),
    [
        (schemas.OpenBody, ["Opening a session", KEPT]),
        (schemas.OptionsBody, [KEPT]),
        (schemas.AppendBody, ["Appending", "Answering", TURN]),
        (schemas.GenerateBody, ["Answering", TURN]),
        (changes.IngestBody, ["Ingesting", TURN]),
        (changes.ForkBody, ["Forking", KEPT]),
        (changes.RollbackBody, ["Rolling back", TURN]),
        (changes.EditBody, ["Editing", TURN]),
        (changes.TouchBody, ["Touching"]),
        (changes.ImportBody, ["Export and import"]),
        (prefixes.PublishBody, ["Publishing a prefix"]),
        (schemas.MessageBody, ["A message"]),
        (schemas.SamplingBody, ["Sampling"]),
    ],
)
def test_a_body_has_the_fields_that_are_listed(model: type[Body], headings: list[str]) -> None:
    listed = [name for heading in headings for name in names(heading)]
    assert sorted(listed) == sorted(model.model_fields)


def test_every_body_is_among_those_above() -> None:
    (mark,) = test_a_body_has_the_fields_that_are_listed.pytestmark
    listed = {model for model, _ in mark.args[1]}
    operations = {
        each
        for module in (schemas, changes)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Body) and hasattr(each, "operation")
    }
    assert operations <= listed


def test_a_key_does_not_cover_the_fields_that_are_listed() -> None:
    text = PAGE.split("### Idempotency keys")[1].split("decided by all fields")[1]
    assert set(re.findall(r"`(\w+)`", text.partition(". ")[0])) == NOT_ASKED


def test_a_list_is_asked_for_by_what_is_listed() -> None:
    (operation,) = [app_of(EngineDouble()).openapi()["paths"]["/v1/sessions"]["get"]]
    assert names("Listing sessions") == [each["name"] for each in operation["parameters"]]


def test_every_event_of_a_session_is_listed() -> None:
    service = Path(service_module.__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in service.glob("*.py"))
    told = set(re.findall(r'tell\(\s*[\w.]+,\s*"([\w.]+)"', code))
    told |= set(re.findall(r'SessionEvent\("([\w.]+)"', code))
    assert len(told) > 9
    assert told | {"error"} == set(names("Events of a session"))


def test_usage_has_the_figures_that_are_listed() -> None:
    assert names("Usage") == [field.name for field in dataclasses.fields(Usage)]


def test_a_published_prefix_has_the_fields_that_are_listed() -> None:
    assert names("A published prefix") == list(PrefixView._fields)


@pytest.mark.anyio
async def test_a_session_and_a_turn_have_the_fields_that_are_listed() -> None:
    import httpx

    transport = httpx.ASGITransport(app_of(EngineDouble()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        session = (await http.post("/v1/sessions", json={})).json()
        assert list(session) == names("A session")
        body = {"messages": [{"role": "user", "content": "x"}], "return_output_ids": True}
        turn = (await http.post(f"/v1/sessions/{session['id']}/append", json=body)).json()
        assert list(turn) == names("A turn")
        assert list(turn["usage"]) == names("Usage")
        stream = await http.post(
            f"/v1/sessions/{session['id']}/append", json={**body, "stream": True}
        )
        events = set(re.findall(r"^event: (\w+)$", stream.text, re.MULTILINE))
        assert {"delta", "done"} == events == set(names("Streams")) - {"error"}


def test_the_fields_of_messages_that_are_ignored_are_listed_with_the_reason() -> None:
    listed = [
        (of.replace(" ", "_"), name.strip("`"), why) for of, name, why in table("Ignored fields")
    ]
    assert listed == [
        (of, name, why) for of, fields in IGNORED_FIELDS.items() for name, why in fields.items()
    ]


def test_every_error_is_listed_with_its_status() -> None:
    listed = {row[0].strip("`"): int(row[1]) for row in table("Errors")}
    assert listed == api_errors.STATUS


def test_every_error_that_can_be_raised_has_a_status() -> None:
    kinds = {
        kind.kind
        for module in (session_errors, api_errors)
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, session_errors.SessionError)
        and kind is not session_errors.SessionError
    }
    of_the_engine = {turn_failed(EngineError(kind, "x"), None).kind for kind in get_args(ErrorKind)}
    assert kinds | of_the_engine == set(api_errors.STATUS)


def test_the_tree_has_the_fields_that_are_listed() -> None:
    from prefix_rig import Rig  # brings SGLang, which nothing else on this page needs

    from stateful_sglang.prefix.policies.base import EvictionClass
    from stateful_sglang.runtime.sessions.requests import TreeSummaryReq
    from stateful_sglang.runtime.sessions.scheduler import SchedulerSessions
    from stateful_sglang.runtime.tree.describe import NodeInfo

    sessions = SchedulerSessions(SimpleNamespace(tree_cache=Rig().tree, draft_worker=None))
    whole = sessions.summarise(TreeSummaryReq(rid="a", stateful_session=None, limit=1))
    assert list(whole.summary) == names("The tree")
    path = sessions.summarise(TreeSummaryReq(rid="b", stateful_session="s", limit=1))
    assert list(path.summary) == names("One session's path")
    assert list(NodeInfo._fields) == names("A node")
    kinds = dict(row[:2] for row in table("The tree"))["`evicted_tokens`"]
    assert re.findall(r"`(\w+)`", kinds) == [kind.name.lower() for kind in EvictionClass]


def test_links_lead_to_pages_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert "constraints.md" in links
    assert [link for link in links if not (DOCS / link).is_file()] == []
