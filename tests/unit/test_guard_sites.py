"""Names that a server answers under, and pages that may use it."""

from __future__ import annotations

import socket

import pytest

from stateful_sglang.api.guard.sites import Sites


@pytest.mark.parametrize(
    ("bind", "host", "answers"),
    [
        ("127.0.0.1", "127.0.0.1:30000", True),
        ("127.0.0.1", "localhost:30000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "localhost.", True),
        ("127.0.0.1", "[::1]:30000", True),
        ("127.0.0.1", "app.localhost:1", True),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "evil.example:30000", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "localhost@evil.example", False),
        ("127.0.0.1", "evil.example/localhost", False),
        ("127.0.0.1", "10.0.0.5:30000", False),
        ("127.0.0.1", "127.0.0.1:port", False),
        ("127.0.0.1", "127.0.0.1, evil.example", False),
        ("127.0.0.1", "", False),
        ("10.0.0.5", "10.0.0.5:30000", True),
        ("10.0.0.5", "10.0.0.6:30000", False),
        ("gpu1", "GPU1:30000", True),
        ("0.0.0.0", "10.0.0.5:30000", True),
        ("::", "[2001:db8::5]:30000", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "evil.example", False),
    ],
)
def test_a_server_answers_under_its_own_names_only(bind: str, host: str, answers: bool) -> None:
    assert Sites(bind).answers_as(host) is answers


def test_further_names_are_those_that_were_named() -> None:
    sites = Sites("0.0.0.0", hosts=["api.example", "2001:db8::1"])
    assert sites.answers_as("api.example:443")
    assert not sites.answers_as("www.api.example")
    assert Sites("127.0.0.1", hosts=["*"]).answers_as("whatever.example")


@pytest.mark.parametrize("host", ["a b", "api.example:80", "http://x", "", "a/b"])
def test_a_name_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="is no host; expected"):
        Sites("127.0.0.1", hosts=[host])


@pytest.mark.parametrize("origin", ["x", "ftp://x", "https://", "https://x/path", "https://a b"])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin of a page; expected"):
        Sites("127.0.0.1", origins=[origin])


@pytest.mark.parametrize(
    ("scheme", "origin", "host", "allowed"),
    [
        ("http", "http://127.0.0.1:30000", "127.0.0.1:30000", True),
        ("http", "http://LOCALHOST:30000", "localhost:30000", True),
        ("http", "http://localhost", "localhost:80", True),
        ("http", "https://api.example", "api.example", True),  # TLS ends in front of the server
        ("https", "https://api.example", "api.example:443", True),
        ("https", "http://api.example", "api.example", False),
        ("ws", "http://127.0.0.1:30000", "127.0.0.1:30000", True),
        ("wss", "http://127.0.0.1:30000", "127.0.0.1:30000", False),
        ("http", "http://127.0.0.1:3000", "127.0.0.1:30000", False),
        ("http", "http://localhost:30000", "127.0.0.1:30000", False),
        ("http", "https://evil.example", "127.0.0.1:30000", False),
        ("http", "null", "127.0.0.1:30000", False),
        ("http", "", "127.0.0.1:30000", False),
        ("http", "http://127.0.0.1:30000.evil.example", "127.0.0.1:30000", False),
        ("http", "http://127.0.0.1:30000@evil.example", "127.0.0.1:30000", False),
        ("http", "chrome-extension://abc", "127.0.0.1:30000", False),
    ],
)
def test_only_pages_of_the_server_itself_may_use_it(
    scheme: str, origin: str, host: str, allowed: bool
) -> None:
    sites = Sites("127.0.0.1", hosts=["api.example"])
    assert sites.origin(scheme, {"origin": origin, "host": host}).allowed is allowed


@pytest.mark.parametrize(
    ("named", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://App.Example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("null", "null"),
        ("*", "https://whatever.example"),
        ("*", "null"),
    ],
)
def test_a_page_that_was_named_may_and_is_told_apart_from_the_servers_own(
    named: str, origin: str
) -> None:
    judged = Sites("127.0.0.1", origins=[named]).origin("http", {"origin": origin, "host": "x"})
    assert judged.allowed
    assert judged.cross == origin


def test_naming_a_page_lets_no_other_in() -> None:
    sites = Sites("127.0.0.1", origins=["https://app.example"])
    for origin in ("http://app.example", "https://app.example:8443", "https://x.app.example"):
        assert not sites.origin("http", {"origin": origin, "host": "127.0.0.1"}).allowed


@pytest.mark.parametrize(
    ("site", "allowed"),
    [("cross-site", False), ("same-site", False), ("same-origin", True), ("none", True)],
)
def test_what_a_page_asks_without_saying_its_origin_is_judged_too(site: str, allowed: bool) -> None:
    headers = {"sec-fetch-site": site, "host": "127.0.0.1"}
    assert Sites("127.0.0.1").origin("http", headers).allowed is allowed
    assert Sites("127.0.0.1", origins=["*"]).origin("http", headers).allowed


def test_a_client_that_is_no_browser_says_neither() -> None:
    assert Sites("127.0.0.1").origin("http", {"host": "127.0.0.1"}) == (True, None)
