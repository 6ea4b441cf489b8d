"""What a person meets first: the lines of a start, the command to try, and SGLang's own routes.

The server runs behind a proxy that answers nobody, so each test also says that loopback spares it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time

import httpx
import pytest

from bench.harness.server import Server

pytestmark = pytest.mark.server


def ready_lines(server: Server) -> list[str]:
    """The log from the ready line on; it follows the first healthy answer closely."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = server.log.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.startswith("Ready after") and "Ctrl-C" in "\n".join(lines):
                return lines[number:]
        time.sleep(0.1)
    raise AssertionError(f"no ready line in\n{server.log.read_text()}")


def test_a_start_shows_settings_and_no_lines_about_other_models(server: Server) -> None:
    ready_lines(server)
    start = server.log.read_text().partition("Ready after")[0]
    # The shared server is asked for the HTTP server's own lines, as another test reads them.
    start = "\n".join(line for line in start.splitlines() if "INFO: " not in line)
    assert re.search(r"^  --max-total-tokens +\d+ ", start, re.MULTILINE)
    for noise in ("Ignore import error", "AWQ", "GGUF", "roll back", "CUDA", "uda graph"):
        assert noise not in start
    assert len(start.splitlines()) < 22, start


def test_the_command_of_the_ready_line_works_as_it_is_printed(server: Server) -> None:
    first, *rest = ready_lines(server)
    assert first.endswith(server.url)
    command = "\n".join(line[2:] for line in rest if line.startswith("  "))
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    reply = json.loads(ran.stdout)
    assert reply["version"] == 1
    assert reply["usage"]["generated_tokens"] > 0


@pytest.fixture(scope="module")
def served_model(server: Server) -> str:
    return str(httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"])


def test_the_responses_route_answers(server: Server, served_model: str) -> None:
    body = {"model": served_model, "input": "Name a colour.", "max_output_tokens": 8}
    reply = httpx.post(f"{server.url}/v1/responses", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    message = next(item for item in reply.json()["output"] if item["type"] == "message")
    assert message["content"][0]["text"]


def test_the_responses_route_streams(server: Server, served_model: str) -> None:
    body = {"model": served_model, "input": "Hi", "max_output_tokens": 8, "stream": True}
    reply = httpx.post(f"{server.url}/v1/responses", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    events = re.findall(r"^event: (\S+)$", reply.text, re.MULTILINE)
    assert events[0] == "response.created"
    assert "response.output_text.delta" in events
    assert events[-1] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "default", "input": "x"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/classify", {"model": "default", "input": "x"}),
        ("/encode", {"text": "x"}),
    ],
)
def test_routes_of_other_kinds_of_models_are_refused_with_the_reason(
    path: str, body: dict[str, object], server: Server
) -> None:
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert reply.status_code == 400
    assert "embedding model" in reply.text
