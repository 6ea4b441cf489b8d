"""A page in a real browser that tries to use a server which its user runs.

One page is of an origin that the server was told of: what fails for the other page works for it,
so that it fails for its origin alone.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.harness import http
from bench.harness.server import Server, serve

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
]
BROWSER_TIMEOUT_S = 180
SECRET = "The secret word is parsnip."

PAGE = """<!doctype html><script>
const session = BASE + "/v1/sessions/" + ID;
const turn = JSON.stringify({
  messages: [{role: "user", content: "A page was here."}], sampling: {max_tokens: 2},
});
const ways = {
  list: async () => (await fetch(BASE + "/v1/sessions")).text(),
  read: async () => (await fetch(session)).text(),
  append: async () => (await fetch(session + "/append", {
    method: "POST", body: turn, headers: {"content-type": "application/json"},
  })).text(),
  simple: async () => (await fetch(session + "/append", {method: "POST", body: turn})).text(),
  blind: async () => (await fetch(session + "/append", {
    method: "POST", body: turn, mode: "no-cors",
  })).type,
  health: async () => (await fetch(BASE + "/health")).status,
  generate: async () => (await fetch(BASE + "/generate", {
    method: "POST", headers: {"content-type": "application/json"},
    body: JSON.stringify({text: "x", sampling_params: {max_new_tokens: 1}}),
  })).text(),
  socket: () => new Promise((done, fail) => {
    const socket = new WebSocket(BASE.replace("http", "ws") + "/v1/realtime");
    socket.onopen = () => done("open");
    socket.onerror = () => fail(new Error("closed"));
  }),
};
(async () => {
  const got = {};
  for (const [name, way] of Object.entries(ways)) {
    try { got[name] = await way(); } catch (error) { got[name] = null; }
  }
  await fetch("/told", {method: "POST", body: JSON.stringify(got)});
})();
</script>"""


class Site:
    """A web site of one page, and what that page could do."""

    def __init__(self) -> None:
        self.page = ""
        self.told: queue.Queue[dict[str, Any]] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(site.page.encode())

            def do_POST(self) -> None:
                site.told.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://localhost:{self.http.server_port}"

    @contextmanager
    def open(self) -> Iterator[Site]:
        thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()


class Pages(NamedTuple):
    server: Server
    allowed: Site
    foreign: Site


@pytest.fixture(scope="module")
def pages(server_arguments: list[str]) -> Iterator[Pages]:
    with (
        Site().open() as allowed,
        Site().open() as foreign,
        serve(*server_arguments, "--allow-origin", allowed.origin) as server,
    ):
        yield Pages(server, allowed, foreign)


def browse(url: str, folder: Path, *more: str) -> str:
    """The page as a browser has it when it is loaded."""
    assert BROWSER is not None
    ran = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",  # Containers give it no user namespaces; it shows our own pages only.
            "--disable-gpu",
            "--no-proxy-server",
            f"--user-data-dir={folder}",
            "--timeout=120000",
            *more,
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=BROWSER_TIMEOUT_S,
    )
    return ran.stdout


def visit(pages: Pages, site: Site, folder: Path) -> tuple[dict[str, Any], int]:
    """What a page of `site` could do to a session, and the session's version after that."""
    with http.client(pages.server.url, timeout_s=60) as owner:
        made = owner.post("/v1/sessions", json={"system": SECRET, "metadata": {"of": "owner"}})
        session = made.json()["id"]
        facts = f"const BASE = {json.dumps(pages.server.url)}, ID = {json.dumps(session)};"
        site.page = PAGE.replace("<script>", f"<script>{facts}", 1)
        browse(site.origin, folder)
        told = site.told.get(timeout=BROWSER_TIMEOUT_S)
        version = owner.get(f"/v1/sessions/{session}").json()["version"]
        owner.delete(f"/v1/sessions/{session}")
    return told, version


def test_a_page_of_another_origin_can_neither_list_nor_read_nor_append(
    pages: Pages, tmp_path: Path
) -> None:
    told, version = visit(pages, pages.foreign, tmp_path)
    # A browser tells a page nothing of what it sends blindly, but that it was sent.
    assert told == {**dict.fromkeys(told), "blind": "opaque"}
    assert len(told) == 8
    assert version == 0


def test_a_page_that_was_allowed_can(pages: Pages, tmp_path: Path) -> None:
    told, version = visit(pages, pages.allowed, tmp_path)
    assert '"sessions"' in told["list"]
    assert json.loads(told["append"])["version"] == 1
    assert json.loads(told["simple"])["version"] == 2
    assert told["health"] == 200
    assert version == 3


def test_a_name_that_was_pointed_at_this_machine_shows_nothing(
    pages: Pages, tmp_path: Path
) -> None:
    """DNS rebinding: the page's own origin is now the server's address."""
    port = pages.server.url.rpartition(":")[2]
    shown = browse(
        f"http://evil.example:{port}/v1/sessions",
        tmp_path,
        "--host-resolver-rules=MAP evil.example 127.0.0.1",
    )
    assert "misdirected_request" in shown
