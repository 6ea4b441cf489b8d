"""Which of SGLang's arguments and environment variables exclude what this launcher adds.

All of SGLang's arguments were gone through for this table. What is not in it works with sessions,
or changes nothing about them. A row names the argument as SGLang stores it, so that its other
spellings, abbreviations and a ``--config`` file count alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stateful_sglang.runtime.options import Options
from stateful_sglang.server.errors import LaunchError


class Conflict(NamedTuple):
    """An argument or an environment variable that a server with sessions cannot have."""

    name: str
    reason: str
    excludes: Callable[[Any], bool]
    """Whether this value does; it is the parsed one, and for variables a string."""


def _given(value: Any) -> bool:
    return value not in (None, False, "", "null", "none")


def _several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "y", "on")


def _false(value: str) -> bool:
    return value.strip().lower() in ("0", "false", "no", "n", "off")


def _samples_several(value: Any) -> bool:
    try:
        preferred = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return False  # SGLang's own parser says what is wrong with it
    return isinstance(preferred, Mapping) and preferred.get("n", 1) != 1


_OWN_TREE = "sessions keep their KV in a prefix tree of their own"
_OWN_SESSIONS = "SGLang's sessions and ours would both decide what the tree keeps"
_ONE_TREE = "a session's KV lies with one scheduler, which requests would miss"
_WHOLE_CONTEXT = "the tree was never run with a context that is split over devices"
_OTHER_DOOR = (
    "requests to SGLang's gRPC server pass none of the keys, tenants and limits of our HTTP routes"
)

OTHER_SERVERS = (
    Conflict("use_ray", "it starts SGLang's server on Ray", _given),
    Conflict("grpc_mode", "it starts SGLang's gRPC server", _given),
    Conflict("smg_grpc_mode", "it starts SGLang's gRPC server", _given),
    Conflict("encoder_only", "it starts SGLang's server of an encoder", _given),
)
"""Modes in which SGLang starts another server than the Python one of this launcher."""

ARGUMENTS = (
    # Another cache than our tree, or none.
    Conflict("disable_radix_cache", _OWN_TREE, _given),
    Conflict("radix_cache_backend", _OWN_TREE, _given),
    Conflict("enable_lmcache", _OWN_TREE, _given),
    Conflict("enable_flexkv", _OWN_TREE, _given),
    Conflict("enable_hierarchical_cache", "the tree does not know KV in host memory yet", _given),
    Conflict("enable_unified_cache_external_linker", "the tree does not know KV elsewhere", _given),
    Conflict("enable_hisparse", "the tree does not know KV in host memory yet", _given),
    Conflict("prefill_only_disable_kv_cache", "a session is KV that is kept", _given),
    Conflict(
        "enable_mis", "scoring many items in one prompt needs a server without a tree", _given
    ),
    Conflict("enable_session_radix_cache", _OWN_SESSIONS, _given),
    Conflict("enable_streaming_session", _OWN_SESSIONS, _given),
    Conflict(
        "strip_thinking_cache",
        "it drops an answer from the cache that the session's next turn continues",
        _given,
    ),
    # Requests that reach another process, or another part of the model, than the session's.
    Conflict("tokenizer_worker_num", "one process owns the sessions' versions", _several),
    Conflict("dp_size", _ONE_TREE, _several),
    Conflict("attn_dp_size", _ONE_TREE, _several),
    Conflict("dwdp_size", _ONE_TREE, _several),
    Conflict("enable_dp_attention", _ONE_TREE, _given),
    Conflict("pp_size", "no turn was ever committed across the stages of a pipeline", _several),
    Conflict("attn_cp_size", _WHOLE_CONTEXT, _several),
    Conflict("dcp_size", _WHOLE_CONTEXT, _several),
    Conflict(
        "disaggregation_mode",
        "a session's KV would have to be with prefill and decode servers both",
        _given,
    ),
    Conflict("enable_pd_role_switch", "it is for servers that only prefill or decode", _given),
    Conflict("enable_pdmux", "turns are committed by the ordinary scheduler loop", _given),
    Conflict("decoupled_spec_role", "turns are committed by the ordinary scheduler loop", _given),
    Conflict("grpc_port", _OTHER_DOOR, _given),
    # Requests that arrive or are answered in another form.
    Conflict("skip_tokenizer_init", "the session routes render and tokenise messages", _given),
    Conflict("is_embedding", "a session generates text, an embedding server does not", _given),
    Conflict("dllm_algorithm", "a diffusion model rewrites tokens that were already sent", _given),
    Conflict(
        "incremental_streaming_output",
        "a transcript is made from outputs that hold all tokens so far",
        _given,
    ),
    Conflict(
        "preferred_sampling_params",
        "a turn has one answer, and this asks for several",
        _samples_several,
    ),
    Conflict(
        "enable_mixed_chunk", "a batch that mixes prompts and decoding cannot verify drafts", _given
    ),
)
"""Arguments that sessions exclude, whether with drafts or without."""

VARIABLES = (
    Conflict(
        "SGLANG_USE_PICKLE_IPC",
        "SGLang's other encoding between processes does not know our append request",
        _false,
    ),
    Conflict("SGLANG_RUST_SERVER", "SGLang's Rust server has none of our routes", _true),
    Conflict("SGLANG_GRPC_PORT", _OTHER_DOOR, _given),
    Conflict(
        "SGLANG_TEST_SCRIPTED_RUNTIME", "SGLang's test harness replaces the scheduler loop", _true
    ),
)
"""Environment variables that sessions exclude."""

_TWO_SETS = "SGLang's keys and ours would both be asked for"
_NO_OWNER = "belong to no tenant"

WITH_KEYS = (
    Conflict("api_key", _TWO_SETS, _given),
    Conflict("admin_api_key", _TWO_SETS, _given),
    Conflict("grpc_port", "SGLang's gRPC server beside the HTTP server asks for no key", _given),
    Conflict("tokenizer_worker_num", "one process asks for keys and knows the tenants", _several),
    Conflict("disaggregation_mode", "its servers talk to each other without a key", _given),
    Conflict("enable_response_store", f"stored responses {_NO_OWNER}", _given),
    Conflict("enable_session_radix_cache", f"SGLang's sessions {_NO_OWNER}", _given),
    Conflict("enable_streaming_session", f"SGLang's sessions {_NO_OWNER}", _given),
)
"""Arguments that a file of keys excludes, with sessions or without."""

VARIABLES_WITH_KEYS = (
    Conflict("SGLANG_GRPC_PORT", "SGLang's gRPC server beside ours asks for no key", bool),
    Conflict("SGLANG_RUST_SERVER", "SGLang's Rust server asks for no key", _true),
)
"""Environment variables that it excludes."""


def plugin_left_out(environ: Mapping[str, str]) -> bool:
    """Whether SGLANG_PLUGINS names the plugins to load, and not ours."""
    listed = {name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    return bool(listed) and "stateful_sglang" not in listed


def first(conflicts: tuple[Conflict, ...], values: Mapping[str, Any]) -> Conflict | None:
    """The first row that a value of these excludes, None where all can stay."""
    return next(
        (row for row in conflicts if row.name in values and row.excludes(values[row.name])), None
    )


def check(given: Mapping[str, Any], options: Options) -> None:
    """Refuse arguments that ask for another kind of server, or contradict sessions.

    Raises:
        LaunchError: Names the argument and the reason.
    """
    other = first(OTHER_SERVERS, given)
    if other is not None:
        raise LaunchError(
            f"{flag(other.name)} is for another kind of server: {other.reason}, and this launcher "
            "SGLang's Python HTTP server. Use python -m sglang.launch_server for it"
        )
    if plugin_left_out(os.environ):
        raise LaunchError(
            f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves out our plugin, without which "
            "this would be another server. Add stateful_sglang to it, or unset it"
        )
    if not options.stateful:
        return
    variable = first(VARIABLES, os.environ)
    if variable is not None:
        raise LaunchError(
            f"{variable.name}={os.environ[variable.name]} cannot be combined with sessions: "
            f"{variable.reason}. Unset it, or add --stateful off"
        )
    conflict = first(ARGUMENTS, given)
    if conflict is not None:
        value = given[conflict.name]
        shown = flag(conflict.name) + ("" if value is True else f" {value}")
        raise LaunchError(
            f"{shown} cannot be combined with sessions: {conflict.reason}. Leave it out, or add "
            "--stateful off"
        )


def check_keys(given: Mapping[str, Any], environ: Mapping[str, str], keys: Path) -> None:
    """Refuse arguments and variables that a file of keys excludes.

    Raises:
        LaunchError: Names it and the reason, and never a value, which may be a secret.
    """
    found, remedy = first(WITH_KEYS, given), "Leave it out"
    name = "" if found is None else flag(found.name)
    if found is None:
        found, remedy = first(VARIABLES_WITH_KEYS, environ), "Unset it"
        name = "" if found is None else found.name
    if found is not None:
        raise LaunchError(
            f"{name} cannot be combined with keys, and {keys} has some: {found.reason}. {remedy}, "
            "or move the file away"
        )


def flag(name: str) -> str:
    """How an argument that SGLang stores as ``name`` is written."""
    return "--" + name.replace("_", "-")
