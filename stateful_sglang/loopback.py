"""Loopback never goes through a proxy.

Machines behind a company's proxy have ``http_proxy`` set and often no ``no_proxy``: a request to
127.0.0.1 then goes to the proxy, which cannot reach it. That breaks a server's warm-up request to
itself as well as its clients. Other addresses keep the proxy that the environment names.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Mapping, MutableMapping

NAMES = ("localhost", "127.0.0.1", "::1")
_VARIABLES = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without brackets, is this machine's loopback."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def spare(environ: MutableMapping[str, str], *hosts: str) -> None:
    """Take loopback and `hosts` out of proxying, for this process and those it will start.

    Both spellings of the variable are set, because libraries differ in which they read; what they
    held stays.
    """
    kept: list[str] = []
    for variable in _VARIABLES:
        kept += [part.strip() for part in environ.get(variable, "").split(",")]
    value = ",".join(dict.fromkeys(filter(None, [*kept, *NAMES, *hosts])))
    for variable in _VARIABLES:
        environ[variable] = value


def direct(url: str) -> dict[str, None]:
    """httpx's ``mounts`` that keep a client of `url` off any proxy; empty unless it is loopback."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if not is_loopback(host):
        return {}
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None}


def has_proxy(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a proxy."""
    return any(environ.get(name) or environ.get(name.upper()) for name in _PROXIES)
