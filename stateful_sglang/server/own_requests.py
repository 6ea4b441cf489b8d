"""SGLang's requests to its own server (warm-up, freezing what is long-lived), with a key.

They come over HTTP and pass the guard like anybody's, before and after keys exist.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stateful_sglang.attachments.check import Attachment

ATTACHMENTS = tuple(
    Attachment(
        f"sglang.srt.entrypoints.http_server.{name}",
        "patch",
        "its requests to the server itself carry the server's own key",
    )
    for name in ("_execute_server_warmup", "_freeze_gc_after_server_warmup")
)


def carry(own_key: str, url: str) -> None:
    """Let what SGLang's server module asks of itself carry this key.

    Args:
        own_key: What the guard takes for the server's own.
        url: Where the server answers; requests to other places stay what they are.
    """
    import requests
    from sglang.srt.entrypoints import http_server

    def request(method: str, to: str, **more: Any) -> requests.Response:
        if to.startswith(f"{url}/"):
            # Not as Authorization, which a .netrc file would replace.
            more["headers"] = {**(more.get("headers") or {}), "x-api-key": own_key}
        return requests.request(method, to, **more)

    # All that the module asks of its HTTP library.
    http_server.requests = SimpleNamespace(
        get=lambda to, **more: request("get", to, **more),
        post=lambda to, **more: request("post", to, **more),
        exceptions=requests.exceptions,
    )
