"""The guard: a pure ASGI middleware around everything that the application is made of."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from stateful_sglang import tenants
from stateful_sglang.api.guard import answers
from stateful_sglang.api.guard.answers import Message, Receive, Refusal, Scope, Send
from stateful_sglang.api.guard.routes import Access, access, route_path
from stateful_sglang.api.guard.sites import Sites
from stateful_sglang.tenants import Identity, InFlight, Keys, OverLimitError

App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALLER = "caller"
"""Under which `request.state` has the `Identity`."""
_RETRY = {"Retry-After": "1"}
_SECRETS = (b"authorization", b"x-api-key")


class Guard:
    """Refuses foreign pages and names, finds out who asks, and bounds what each tenant asks.

    Behind it `tenants.current()` and ``request.state.caller`` say whose request runs. What it has
    judged is taken out of the request: keys, so that no log shows them, and ``Origin``, which
    SGLang's own middleware would answer with leave for everybody.
    """

    def __init__(
        self, app: App, sites: Sites, keys: Keys | None = None, own_key: str | None = None
    ) -> None:
        """Stand in front of an application.

        Args:
            app: What serves.
            sites: The server's names, and pages that may use it.
            keys: None: there are none and never will be.
            own_key: What the server's own requests to itself carry.
        """
        self._app = app
        self._sites = sites
        self._keys = keys
        self._own_key = own_key
        self._in_flight = InFlight()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        origin = self._sites.origin(scope.get("scheme", "http"), headers)
        refusal = self._foreign_name(scope, headers)
        if refusal is None and not origin.allowed:
            refusal = _foreign_page(origin.cross)
        if refusal is not None:
            await answers.refuse(scope, send, refusal)
            return
        if origin.cross is not None and scope["type"] == "http":
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await answers.preflight(send, origin.cross, headers)
                return
            send = answers.to_page(send, origin.cross)
        path = route_path(scope["path"], scope.get("root_path", ""))
        caller = self._caller(path, headers)
        if isinstance(caller, Refusal):
            await answers.refuse(scope, send, caller)
            return
        judged = {b"origin", *(_SECRETS if self._keyed else ())}
        scope = {
            **scope,
            "headers": [each for each in scope["headers"] if each[0].lower() not in judged],
            "state": {**scope.get("state", {}), CALLER: caller},
        }
        with tenants.acting_as(caller):
            if caller.limits is None or access(path) is not Access.TENANT:
                await self._app(scope, receive, send)
            else:
                await self._counted(caller, headers, scope, receive, send)

    @property
    def _keyed(self) -> bool:
        return self._keys is not None and self._keys.exist

    def _foreign_name(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        named = [value for name, value in scope["headers"] if name.lower() == b"host"]
        # No browser leaves it out, and some probes do.
        if not named or (len(named) == 1 and self._sites.answers_as(headers["host"])):
            return None
        return Refusal(
            421,
            "misdirected_request",
            f"this server does not answer as {headers['host'][:200]!r}: the Host header is none "
            "of its names; start it with --allow-host NAME to add one",
        )

    def _caller(self, path: str, headers: Mapping[str, str]) -> Identity | Refusal:
        if not self._keyed:
            return tenants.ALONE
        wanted = access(path)
        if wanted is Access.OPEN:
            return tenants.NOBODY
        key = _key(headers)
        if key is not None and self._is_own(key):
            return tenants.SERVER
        assert self._keys is not None
        caller = None if key is None else self._keys.identify(key)
        if caller is None:
            what = "no API key came with it" if key is None else "its API key is unknown or revoked"
            return Refusal(
                401,
                "unauthorized",
                f"this request needs an API key, and {what}; send one as Authorization: Bearer "
                "KEY, or as x-api-key",
                {"WWW-Authenticate": "Bearer"},
            )
        if wanted is Access.ADMIN and not caller.admin:
            return Refusal(
                403,
                "forbidden",
                "this route concerns all tenants and needs an administrator's key",
            )
        return caller

    def _is_own(self, key: str) -> bool:
        # As bytes: of text, only ASCII can be compared.
        own = self._own_key
        return own is not None and hmac.compare_digest(key.encode(), own.encode())

    async def _counted(
        self,
        caller: Identity,
        headers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Serve, with the request and its body counted against the tenant's limits."""
        assert caller.limits is not None
        declared = headers.get("content-length", "")
        body_bytes = int(declared) if declared.isdecimal() else 0
        try:
            self._in_flight.enter(caller.tenant, caller.limits, body_bytes)
        except OverLimitError as error:
            await answers.refuse(scope, send, _over(error))
            return
        if declared or scope["type"] == "websocket":
            try:
                await self._app(scope, receive, send)
            finally:
                self._in_flight.leave(caller.tenant, body_bytes)
            return
        body = _Body(caller, self._in_flight, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.cut_off:
                raise
        finally:
            self._in_flight.leave(caller.tenant, body.size)
        if body.cut_off:
            assert body.refusal is not None
            await answers.refuse(scope, send, body.refusal)


class _Body:
    """A body of unannounced length: counted as it comes, and cut off where it is too much."""

    def __init__(self, caller: Identity, in_flight: InFlight, receive: Receive, send: Send) -> None:
        assert caller.limits is not None
        self._tenant, self._limits = caller.tenant, caller.limits
        self._in_flight = in_flight
        self._receive, self._send = receive, send
        self._answered = False
        self.size = 0
        self.refusal: Refusal | None = None

    @property
    def cut_off(self) -> bool:
        """Whether the request ended for it, unanswered."""
        return self.refusal is not None and not self._answered

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        message = await self._receive()
        size = len(message.get("body", b""))
        try:
            self._in_flight.grow(self._tenant, self._limits, size, self.size)
        except OverLimitError as error:
            self.refusal = _over(error)
            return {"type": "http.disconnect"}
        self.size += size
        return message

    async def send(self, message: Message) -> None:
        if not self.cut_off:
            self._answered = True
            await self._send(message)


def attach(app: Any, **guard: Any) -> None:
    """Put a guard around a Starlette application, outside whatever middleware it has or gets.

    SGLang adds middleware as late as at its launch, and what is added last is outermost. The
    application builds the whole stack at its first call: that is what we stand around.

    Args:
        app: Not called yet.
        guard: What `Guard` takes beside its application.
    """
    assert app.middleware_stack is None, "the application serves already"
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: Guard(build(), **guard)


def _key(headers: Mapping[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _foreign_page(origin: str | None) -> Refusal:
    page = "another site's page" if origin is None else f"a page of {origin[:200]!r}"
    return Refusal(
        403,
        "foreign_origin",
        f"this request comes from {page}, which may not use this server; start it with "
        "--allow-origin ORIGIN to let it",
    )


def _over(error: OverLimitError) -> Refusal:
    if error.ever:
        return Refusal(413, "body_too_large", str(error))
    return Refusal(429, "too_many_requests", str(error), _RETRY)
