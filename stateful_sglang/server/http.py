"""SGLang's HTTP server in this process, with our routes on it."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from stateful_sglang.api.guard.sites import Sites
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import ready, supervisor
from stateful_sglang.tenants import Keys

if TYPE_CHECKING:
    from stateful_sglang.server.drain import Drain

_LAST_COMMITS_S = 5.0
"""Seconds for commits that are under way when requests have ended, or were aborted."""


def serve(server_args: Any, options: Options) -> int:
    """Run SGLang's HTTP server in this process until it is told to stop; the exit status."""
    import torch
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.utils.common import kill_process_tree

    from stateful_sglang.api import unserved
    from stateful_sglang.server import isolation, own_requests, processes
    from stateful_sglang.server.drain import Drain

    torch.set_num_threads(1)  # This process tokenises and serves HTTP; the scheduler computes.
    unserved.attach(app)
    drain = Drain(options.drain_s)
    extra = _stateful_client(app, server_args, options, drain) if options.stateful else {}
    keys = isolation.keys(server_args, options)
    own_key = secrets.token_urlsafe(32)
    own_requests.carry(own_key, server_args.url())
    _keep_apart(app, isolation.sites(server_args.host, options), keys, own_key)

    def answering() -> None:
        drain.ready()
        key = bool(server_args.api_key) if keys is None else keys.exist
        ready.announce(server_args, options, key=key)
        supervisor.tell_ready(server_args.host, server_args.port)

    try:
        launch_server(
            server_args,
            run_scheduler_process_func=processes.run_scheduler_process,
            run_detokenizer_process_func=processes.run_detokenizer_process,
            launch_callback=answering,
            **extra,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return drain.status


def _keep_apart(app: Any, sites: Sites, keys: Keys | None, own_key: str) -> None:
    """Guard all of the application, and the one route of it that reaches others' requests."""
    from sglang.srt.entrypoints.http_server import get_global_state

    from stateful_sglang.api import aborts, guard
    from stateful_sglang.runtime import isolation

    def manager() -> Any:
        return get_global_state().tokenizer_manager

    aborts.replace_route(
        app,
        abort=lambda rid: isolation.abort_from_outside(manager(), rid),
        abort_all=lambda: manager().abort_request(abort_all=True),
    )
    guard.attach(app, sites=sites, keys=keys, own_key=own_key)


def _stateful_client(app: Any, server_args: Any, options: Options, drain: Drain) -> dict[str, Any]:
    """The parts of `launch_server` that only a stateful server replaces."""
    from stateful_sglang.api import access_log
    from stateful_sglang.api.native.routes import build_router
    from stateful_sglang.api.openai import chat
    from stateful_sglang.api.openai.reuse import ReuseHeader
    from stateful_sglang.runtime.ending import SGLangEnding
    from stateful_sglang.runtime.sessions.engine import SGLangEngine
    from stateful_sglang.runtime.sessions.manager import stateful_tokenizer_manager
    from stateful_sglang.server.callers import caller_of
    from stateful_sglang.server.journal import open_journal
    from stateful_sglang.server.metrics import PrometheusObserver
    from stateful_sglang.service.observe import NullObserver
    from stateful_sglang.service.service import Limits, SessionService

    access_log.install()
    drain.attach(app)
    journal = open_journal(options)
    limits = Limits(
        content_tokens=options.content_tokens, default_ttl_s=options.session_ttl_s or None
    )

    def follow(manager: Any) -> None:
        # Made here at the earliest: SGLang has set up the figures of several processes by now.
        observer = PrometheusObserver() if server_args.enable_metrics else NullObserver()
        service = SessionService(SGLangEngine(manager), journal, limits, observer)

        async def begin() -> None:
            service.begin_drain()

        drain.follow(SGLangEnding(manager, drain.begin))
        drain.on_begin, drain.on_end = begin, partial(service.shutdown, _LAST_COMMITS_S)
        app.include_router(build_router(service, caller_of))
        once_served(app, service.begin)
        if options.dropin != "off":
            exact = options.dropin == "exact"
            conversations = chat.Conversations(service, caller_of, partial(_check, manager), exact)
            manager.chat_class = chat.over(conversations)
            manager.follow = partial(chat.follow, conversations)

    if options.dropin != "off":
        app.add_middleware(ReuseHeader)
    return {"init_tokenizer_manager_func": stateful_tokenizer_manager(follow)}


def once_served(app: Any, begin: Callable[[], None]) -> None:
    """Call `begin` in the application's loop, before its first request; the engine answers then."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncIterator[Any]:
        async with inner(served) as state:
            begin()
            yield state

    app.router.lifespan_context = lifespan


def _check(manager: Any, obj: Any) -> None:
    """Raise where a request holds what the scheduler can't take."""
    from stateful_sglang.runtime import admission

    config = manager.model_config
    admission.check(obj, vocab_size=config.vocab_size, hidden_size=config.hidden_size)
