"""A proxy is for other machines."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator

import httpx
import pytest
import requests
from requests.utils import should_bypass_proxies

from stateful_sglang import loopback
from stateful_sglang.client import AsyncClient, Client

CLOSED_PORT = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", CLOSED_PORT)


@pytest.fixture
def url() -> Iterator[str]:
    """A server on the loopback interface that knows no sessions."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"sessions": [], "total": 0}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_client_reaches_a_server_on_this_machine(url: str) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)  # what any client does that leaves it to the environment
    with Client(url) as client:
        assert client.sessions() == []


def test_the_asynchronous_client_does_too(url: str) -> None:
    async def ask() -> list[dict[str, object]]:
        async with AsyncClient(url) as client:
            return await client.sessions()

    assert asyncio.run(ask()) == []


def test_a_client_of_another_machine_keeps_the_proxy() -> None:
    with (
        Client("http://192.0.2.1:30000", timeout=5, max_retries=0) as client,
        pytest.raises(httpx.ConnectError),
    ):
        client.sessions()  # refused by the closed port at once, not lost on the way to 192.0.2.1


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("a.localhost", True),
        ("0.0.0.0", False),
        ("localhost.example.org", False),
        ("10.0.0.1", False),
    ],
)
def test_what_loopback_is(host: str, expected: bool) -> None:
    assert loopback.is_loopback(host) is expected
    url = f"http://[{host}]:1" if ":" in host else f"http://{host}:1"
    assert bool(loopback.direct(url)) is expected


def test_a_process_spares_loopback_and_its_own_address(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    environ = {"NO_PROXY": "example.org", "http_proxy": CLOSED_PORT}
    loopback.spare(environ, "192.0.2.7")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, environ[name])
    assert requests.get(url, timeout=5).status_code == 200
    assert httpx.get(url, timeout=5).status_code == 200
    assert should_bypass_proxies("http://[::1]:30000/", None)
    assert should_bypass_proxies("http://192.0.2.7:30000/", None)
    assert should_bypass_proxies("http://example.org/", None)
    assert not should_bypass_proxies("http://192.0.2.1/", None)


def test_sparing_twice_is_sparing_once() -> None:
    environ: dict[str, str] = {}
    loopback.spare(environ)
    once = dict(environ)
    loopback.spare(environ)
    assert environ == once
