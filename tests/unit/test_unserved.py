"""A route whose handler failed at start answers 501 with the reason."""

from __future__ import annotations

import logging
import types
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from stateful_sglang.api import unserved


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.post("/v1/responses")
    async def responses(request: Request) -> None:
        await request.app.state.openai_serving_responses.create(request)

    @app.get("/v1/other")
    async def other(request: Request) -> None:
        await request.app.state.openai_serving_other.create(request)

    @app.get("/broken")
    async def broken() -> None:
        types.SimpleNamespace().missing  # noqa: B018

    unserved.attach(app)
    return TestClient(app, raise_server_exceptions=False)


def test_the_reason_is_the_one_that_sglang_logged(client: TestClient) -> None:
    logging.getLogger("sglang.srt.entrypoints.http_server").warning(
        "OpenAI Responses API (/v1/responses) disabled: OpenAIServingResponses init failed "
        "(ModuleNotFoundError: No module named 'openai_harmony')"
    )
    reply = client.post("/v1/responses", json={})
    assert reply.status_code == 501
    error = reply.json()["error"]
    assert "POST /v1/responses cannot be served here" in error["message"]
    assert "No module named 'openai_harmony'" in error["message"]
    assert error["code"] == 501


def test_without_one_the_missing_handler_is_named(client: TestClient) -> None:
    reply = client.get("/v1/other")
    assert reply.status_code == 501
    assert "openai_serving_other was not made" in reply.json()["error"]["message"]


def test_another_attribute_error_stays_a_500(client: TestClient) -> None:
    assert client.get("/broken").status_code == 500


def test_sglang_still_words_its_warning_so() -> None:
    import importlib.util

    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).with_name("srt") / "entrypoints" / "http_server.py"
    assert "(/v1/responses) disabled: " in source.read_text()
