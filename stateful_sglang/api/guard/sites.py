"""Which web pages may talk to a server, and under which names it answers.

A browser sends requests of any page it shows, to this machine's loopback as well. What a page can't
change tells them apart: ``Origin`` and ``Sec-Fetch-Site`` say whose page it is, and ``Host`` under
which name the browser looked the server up. A foreign name that was pointed at this machine (DNS
rebinding) would make a foreign page one of the server's own.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stateful_sglang import loopback

ANY = "*"
_PORTS: Mapping[str, int] = {"http": 80, "https": 443}


class _Address(NamedTuple):
    host: str
    """Lower case, without brackets."""
    port: int | None


class Origin(NamedTuple):
    """Whose page a request comes from."""

    allowed: bool
    cross: str | None = None
    """The origin as the browser named it, where the page is another's: its browser wants to hear
    from us that it may read the answer."""


class Sites:
    """The names of one server, and the pages that may use it."""

    def __init__(self, bind: str, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        """Decide by what was asked for at the start.

        Args:
            bind: The address that the server listens on.
            hosts: Further names under which it answers, without a port; ``*``: under any.
            origins: Foreign pages that may use it, as ``https://host[:port]``; ``null``: those
                without an origin, such as files; ``*``: any.

        Raises:
            ValueError: A host or an origin is none; says what was expected.
        """
        bind = bind.strip("[]").lower()
        self._any_address = bind in ("", "0.0.0.0", "::")
        self._hosts = {_named_host(host) for host in hosts} | {bind}
        if self._any_address:
            self._hosts.add(socket.gethostname().lower())
        self._origins = {_named_origin(origin) for origin in origins}

    def answers_as(self, host: str) -> bool:
        """Whether a Host header names this server, under whatever port."""
        address = _address(host)
        if address is None:
            return False
        name = address.host
        if ANY in self._hosts or name in self._hosts or loopback.is_loopback(name):
            return True
        # Nobody can point an address somewhere else, so that it is no name of a foreign page's.
        return self._any_address and _is_address(name)

    def origin(self, scheme: str, headers: Mapping[str, str]) -> Origin:
        """Judge the page that a request comes from, if it comes from one.

        Args:
            scheme: Of the request: http, https, ws or wss.
            headers: By lower-case name.
        """
        named = headers.get("origin")
        if named is None:
            # What a page asks without leave to read the answer (images, links, forms with GET).
            foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            return Origin(not foreign or ANY in self._origins)
        if self._is_own(scheme, named, headers.get("host", "")):
            return Origin(True)
        allowed = ANY in self._origins or _plain(named) in self._origins
        return Origin(allowed, named)

    @staticmethod
    def _is_own(scheme: str, named: str, host: str) -> bool:
        of, _, rest = named.partition("://")
        if of not in _PORTS or (scheme in ("https", "wss") and of != "https"):
            return False
        page, server = _address(rest), _address(host)
        if page is None or server is None or page.host != server.host:
            return False
        default = _PORTS[of]
        return (page.port or default) == (server.port or default)


def _address(text: str) -> _Address | None:
    if not text or any(char in text for char in "/\\@?# \t"):
        return None
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    return None if not host else _Address(host.removesuffix("."), port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _plain(origin: str) -> str:
    """An origin as browsers write it: lower case, no default port."""
    scheme, sign, rest = origin.lower().partition("://")
    return f"{scheme}{sign}{rest.removesuffix(f':{_PORTS.get(scheme)}')}"


def _named_host(host: str) -> str:
    if host == ANY:
        return host
    address = _address(f"[{host}]" if host.count(":") > 1 and host[0] != "[" else host)
    if address is None or address.port is not None:
        raise ValueError(f"{host!r} is no host; expected a name or an address without a port, or *")
    return address.host


def _named_origin(origin: str) -> str:
    if origin in (ANY, "null"):
        return origin
    scheme, _, rest = origin.lower().partition("://")
    if scheme not in _PORTS or _address(rest) is None:
        raise ValueError(
            f"{origin!r} is no origin of a page; expected https://host or http://host:port without "
            "a path, null, or *"
        )
    return _plain(origin)
