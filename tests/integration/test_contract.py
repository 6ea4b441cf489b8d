"""Our routes under what their own OpenAPI description allows, and under what it does not.

Cases come from schemathesis, of both kinds, and from a strategy of appends that are well-formed, so
that many reach the model. Half of all go to sessions that are open. Whatever comes: no answer but a
documented one, and the server lives on. `pytest -s` shows the table; ``STATEFUL_SGLANG_CONTRACT``
sets the number of requests of the slow test.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from bench.harness.server import Server

pytestmark = pytest.mark.server

REQUESTS_ENV = "STATEFUL_SGLANG_CONTRACT"
OURS = r"^/v1/(sessions|tree|prefixes)"
MAX_TOKENS = 3
"""Cap on what a case may generate: its time is the model's, and says nothing about the contract."""
DOCUMENTED_5XX = frozenset({503})
ANSWERS = ("/append", "/generate")
"""Ends of the routes that generate."""
MANY = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@dataclass
class Tally:
    """What was sent and what came back."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    live: int = 0
    """Requests that named a session which was open."""
    generated: int = 0
    """Turns that committed."""
    broken: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.answers.total()

    def table(self) -> str:
        """Number of requests by route and status."""
        statuses = sorted({status for _, status in self.answers})
        rows = [f"{'route':<40}" + "".join(f"{status:>7}" for status in statuses)]
        for route in sorted({route for route, _ in self.answers}):
            counts = "".join(f"{self.answers[route, status] or '':>7}" for status in statuses)
            rows.append(f"{route:<40}{counts}")
        rows.append(f"{self.total} requests, {self.live} on live sessions, {self.generated} turns")
        return "\n".join(rows)


class Driver:
    """Sends cases to a server, keeps some sessions open for them, and counts."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._open: list[str] = []
        self.tally = Tally()

    def session(self) -> str:
        """One of a few open sessions; a new one now and then, since cases close them too."""
        while len(self._open) < 8:
            self._open.append(
                self._http.post("/v1/sessions", json={}).raise_for_status().json()["id"]
            )
        return secrets.choice(self._open)

    def send(self, method: str, route: str, path: str, **request: Any) -> None:
        """One request, counted under its route."""
        if route.endswith("/events"):
            answer = self._first_event(method, path, **request)
        else:
            answer = self._http.request(method, path, **request)
        status = answer.status_code
        self.tally.answers[f"{method} {route}", status] += 1
        if any(session in path for session in self._open):
            self.tally.live += 1
        if status >= 500 and status not in DOCUMENTED_5XX:
            self.tally.broken.append(f"{method} {path} {request}: {status} {answer.text[:300]}")
        elif status >= 400:
            assert answer.json()["error"]["message"], answer.text
        elif route.endswith(ANSWERS):
            streamed = answer.headers["content-type"].startswith("text/event-stream")
            if streamed and "event: error" in answer.text:
                assert '"status": 5' not in answer.text or '"status": 503' in answer.text, (
                    answer.text
                )
            else:
                self.tally.generated += 1
        if method == "DELETE" and status == httpx.codes.OK:
            self._open = [each for each in self._open if each not in path]
        if method == "POST" and route.endswith(ANSWERS):
            # A session that has grown long is left for a new one: the context is small here.
            self._open = self._open[-8:] if self.tally.total % 50 else self._open[1:]

    def _first_event(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer of a stream that lasts, up to its first event."""
        with self._http.stream(method, path, **request) as answer:
            if answer.is_success:
                assert next(answer.iter_lines()) == "event: listening"
            else:
                answer.read()
            return answer


def _bounded(body: Any) -> Any:
    """The body, generating a few tokens at most where it would be accepted."""
    if not isinstance(body, dict):
        return body
    sampling = body.get("sampling", {})
    if isinstance(sampling, dict):
        wanted = sampling.get("max_tokens", MAX_TOKENS)
        if wanted is None or (type(wanted) is int and wanted >= MAX_TOKENS):
            floor = sampling.get("min_tokens")
            keep = min(floor, MAX_TOKENS) if type(floor) is int and floor > 0 else floor
            extra = {} if floor is None else {"min_tokens": keep}
            body = {**body, "sampling": {**sampling, "max_tokens": MAX_TOKENS, **extra}}
    return body


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=MANY,
    )


def _drive_operation(driver: Driver, operation: Any, mode: GenerationMode, examples: int) -> None:
    @_settings(examples)
    @given(case=operation.as_strategy(generation_mode=mode), live=st.integers(0, 9))
    def run(case: Any, live: int) -> None:
        if live < 7 and "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = driver.session()
        if case.method == "POST" and operation.path.endswith(ANSWERS):
            case.body = _bounded(case.body)
        sent = case.as_transport_kwargs(base_url=str(driver._http.base_url))
        request = httpx.Request(
            sent["method"],
            sent["url"],
            params=sent.get("params"),
            headers=dict(sent.get("headers") or {}),
            json=sent.get("json"),
        )
        driver.send(
            case.method,
            operation.path,
            str(request.url),
            content=request.content,
            headers={"content-type": "application/json"},
        )

    with contextlib.suppress(Unsatisfiable):  # some operations take nothing that could be wrong
        run()


_TEXT = st.text(max_size=40)
_NUMBERS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, MAX_TOKENS)},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(1, 100),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**31),
        "frequency_penalty": st.floats(-2, 2),
        "stop": st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3),
        "regex": st.sampled_from(["ok", "[0-9]{1,3}"]),
    },
)
_APPENDS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "tool"]), "content": _TEXT},
            ),
            min_size=1,
            max_size=3,
        ),
        "sampling": _NUMBERS,
    },
    optional={"stream": st.booleans(), "return_output_ids": st.booleans()},
)


def _drive_appends(driver: Driver, examples: int) -> None:
    @_settings(examples)
    @given(body=_APPENDS)
    def run(body: dict[str, Any]) -> None:
        path = f"/v1/sessions/{driver.session()}/append"
        driver.send("POST", "/v1/sessions/{session_id}/append", path, json=body)

    run()


_VERSIONS = st.integers(0, 6)
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": _TEXT}),
    min_size=1,
    max_size=2,
)
_WRITING = {
    "expected_version": _VERSIONS,
    "on_busy": st.sampled_from(["wait", "fail"]),
    "idempotency_key": st.sampled_from(["a", "b", "c"]),
}
_CHANGES = st.one_of(
    st.tuples(st.just("generate"), st.fixed_dictionaries({}, optional=_WRITING).map(_bounded)),
    st.tuples(st.just("ingest"), st.fixed_dictionaries({"messages": _MESSAGES}, optional=_WRITING)),
    st.tuples(
        st.just("rollback"), st.fixed_dictionaries({"version": _VERSIONS}, optional=_WRITING)
    ),
    st.tuples(
        st.just("edit"),
        st.fixed_dictionaries(
            {"after": _VERSIONS},
            optional={"through": _VERSIONS, "messages": _MESSAGES, **_WRITING},
        ),
    ),
    st.tuples(st.just("fork"), st.fixed_dictionaries({}, optional={"version": _VERSIONS})),
    st.tuples(
        st.just("append"),
        st.fixed_dictionaries(
            {"messages": _MESSAGES},
            optional={"ephemeral": st.booleans(), "detach": st.booleans(), **_WRITING},
        ).map(_bounded),
    ),
)
"""Operations that are well-formed, so that many change a session."""


def _drive_changes(driver: Driver, examples: int) -> None:
    @_settings(examples)
    @given(change=_CHANGES)
    def run(change: tuple[str, dict[str, Any]]) -> None:
        operation, body = change
        path = f"/v1/sessions/{driver.session()}/{operation}"
        driver.send("POST", f"/v1/sessions/{{session_id}}/{operation}", path, json=body)

    run()


@pytest.fixture
def driver(server: Server) -> Iterator[Driver]:
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http:
        yield Driver(http)


def _contract(server: Server, driver: Driver, requests: int) -> Tally:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").include(path_regex=OURS)
    operations = [result.ok() for result in schema.get_all_operations()]
    share = requests // (2 * len(operations) + 8)
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _drive_operation(driver, operation, mode, share)
    _drive_changes(driver, 4 * share)
    while driver.tally.total < requests:
        _drive_appends(driver, min(200, requests - driver.tally.total))
    return driver.tally


def _check(server: Server, tally: Tally) -> None:
    print(f"\n{tally.table()}")
    assert tally.broken == []
    answer = httpx.get(f"{server.url}/health_generate", timeout=60, trust_env=False)
    assert answer.status_code == httpx.codes.OK


def test_a_few_hundred_requests_get_documented_answers(server: Server, driver: Driver) -> None:
    tally = _contract(server, driver, 300)
    _check(server, tally)


@pytest.mark.slow
def test_thousands_of_requests_get_documented_answers(server: Server, driver: Driver) -> None:
    requests = int(os.environ.get(REQUESTS_ENV, "5000"))
    tally = _contract(server, driver, requests)
    _check(server, tally)
    assert tally.live >= requests // 2
    assert tally.generated >= requests // 10
