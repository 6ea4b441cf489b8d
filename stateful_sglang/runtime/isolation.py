"""SGLang's own requests kept apart by tenant: their KV, their ids, what they may ask for.

Whose request runs is what `tenants.current()` says; the guard in front of the routes sets it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from stateful_sglang import tenants
from stateful_sglang.attachments.check import Attachment
from stateful_sglang.tenants import Identity
from stateful_sglang.tenants.salts import narrowed, request_id

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
ATTACHMENTS = (
    Attachment(
        f"{_MANAGER}._create_tokenized_object",
        "hook",
        "a request's KV salt is its tenant's, narrowed by its own, behind what SGLang logs of it",
    ),
    Attachment(
        f"{_MANAGER}._init_req_state",
        "hook",
        "the one place where requests get their state: whose they are is noted there",
    ),
    Attachment(
        f"{_MANAGER}.init_running_status",
        "relies",
        "an abort from outside reaches requests of its tenant only",
    ),
    Attachment(
        "sglang.srt.managers.scheduler.Scheduler.abort_request",
        "relies",
        "aborts by prefix, so that requests run under ids of one length",
    ),
    Attachment(
        "sglang.srt.entrypoints.http_server.abort_request",
        "patch",
        "the route ends requests of the caller's tenant only",
    ),
    Attachment(
        f"{_MANAGER}._handle_batch_output",
        "relies",
        "an answer's id is where clients find their own",
    ),
)

_TRUSTED: Mapping[str, str] = {
    "session_params": "sessions of SGLang's belong to no tenant; use /v1/sessions",
    "kv_hints": "it steers storage that all tenants share",
    "mm_hashes": "it names cached media, which all tenants share",
    "custom_logit_processor": "it is code that runs in the server",
}
"""Fields of a request that reach beyond its tenant, and why they can't be let in."""
_HEALTH_ROUTES = ("/health", "/health_generate", "/ping")
_OWNER = "stateful_tenant"


def attach() -> None:
    """Register the hooks; `admission` asks the rest of this module at its own."""
    HookRegistry.register(f"{_MANAGER}._create_tokenized_object", _salt, HookType.AFTER)
    HookRegistry.register(f"{_MANAGER}._init_req_state", _note_owner, HookType.AFTER)


def problem(obj: Any, manager: Any) -> str | None:
    """Why the current caller may not ask for this; None where it may.

    Args:
        obj: SGLang's ``GenerateReqInput`` or ``EmbeddingReqInput``.
        manager: SGLang's tokenizer manager, which knows the server's settings.
    """
    caller = tenants.current()
    if caller.salt is None or _is_turn(obj):
        return None
    if not hasattr(obj, "cache_salt") and not manager.config_value("disable_radix_cache"):
        return (
            "embeddings share KV between tenants in this release of SGLang, so that this server "
            "with keys gives none; start it with --disable-radix-cache"
        )
    if caller.admin:
        return None
    for name, why in _TRUSTED.items():
        if getattr(obj, name, None) not in (None, [], {}, ""):
            return f"{name}: not for tenants: {why}"
    return None


def id_problem(obj: Any, batch: int | None) -> str | None:
    """What is wrong with the ids that a client named its request by; None: nothing."""
    given = obj.rid
    if given is None or isinstance(given, str):
        return None
    if batch is None or not isinstance(given, list):
        return f"rid: {type(given).__name__} can't name one prompt; expected a string"
    if not all(isinstance(each, str) for each in given) or len(set(given)) != len(given):
        return "rid: expected a string for each prompt, no two alike"
    return None


def under_own_ids(obj: Any, batch: int | None, request: Any) -> Mapping[str, str]:
    """Let a request run under ids of ours where its client named it.

    Args:
        obj: Checked, and not normalised yet.
        batch: Prompts of a batch; None for one prompt that comes alone.
        request: The HTTP request, or None.

    Returns:
        The client's ids by ours; empty where it gave none.
    """
    salt = tenants.current().salt
    if (session := getattr(obj, "session_params", None)) and isinstance(session.get("rid"), str):
        obj.session_params = {**session, "rid": request_id(salt, session["rid"])}
    given = obj.rid
    if given is None or _is_turn(obj) or _is_probe(request):
        return {}
    if batch is None:
        obj.rid = request_id(salt, given)
        return {} if obj.rid == given else {obj.rid: given}
    # As SGLang makes of one name for many.
    names = given if isinstance(given, list) else [f"{given}_{at}" for at in range(batch)]
    obj.rid = [request_id(salt, name) for name in names]
    return dict(zip(obj.rid, names, strict=True))


async def as_named(outputs: AsyncIterator[Any], names: Mapping[str, str]) -> AsyncIterator[Any]:
    """Outputs with the ids that their client knows them by."""
    async with aclosing(outputs):  # type: ignore[type-var]
        async for out in outputs:
            for each in out if isinstance(out, list) else [out]:
                meta = each.get("meta_info")
                if meta is not None and meta.get("id") in names:
                    meta["id"] = names[meta["id"]]
            yield out


def abort_from_outside(manager: Any, rid: str) -> None:
    """Abort a request by either of its ids, if it is of the current caller's tenant."""
    caller = tenants.current()
    for candidate in (request_id(caller.salt, rid), rid):
        state = manager.rid_to_state.get(candidate)
        if state is not None and _owns(caller, state):
            manager.abort_request(candidate)
            return


def _owns(caller: Identity, state: Any) -> bool:
    return caller.admin or getattr(state, _OWNER, None) == caller.tenant


def _is_turn(obj: Any) -> bool:
    """Whether it is a turn of ours: its service has decided all of this."""
    return getattr(obj, "turn", None) is not None


def _is_probe(request: Any) -> bool:
    """Whether it is SGLang's own health request, which the scheduler tells by its id."""
    return request is not None and request.scope["path"].endswith(_HEALTH_ROUTES)


def _salt(tokenized: Any, _manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    salt = tenants.current().salt
    if salt is None or not hasattr(tokenized, "cache_salt"):
        return
    if not _is_turn(obj):
        tokenized.cache_salt = narrowed(salt, tokenized.cache_salt)
    elif tokenized.cache_salt is None:
        tokenized.cache_salt = salt  # The session's is its tenant's, who is the caller.


def _note_owner(_result: Any, manager: Any, obj: Any, _request: Any = None) -> None:
    owner = None if _is_turn(obj) else tenants.current().tenant
    for rid in obj.rid if isinstance(obj.rid, list) else [obj.rid]:
        setattr(manager.rid_to_state[rid], _OWNER, owner)
