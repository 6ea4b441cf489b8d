"""Clients of servers on this machine, which no proxy that the environment names stands between."""

from __future__ import annotations

import os

import httpx

TIMEOUT_S = 600.0


def client(url: str, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """A client of one server."""
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False)


def async_client(url: str, timeout_s: float = TIMEOUT_S) -> httpx.AsyncClient:
    """The same, for many requests at once."""
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False)


def direct_loopback() -> dict[str, str]:
    """Environment of a server, with which it reaches itself directly where a proxy is set."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for host in listed.split(",") if host]
    hosts += [host for host in ("127.0.0.1", "localhost") if host not in hosts]
    return {"no_proxy": ",".join(hosts), "NO_PROXY": ",".join(hosts)}
