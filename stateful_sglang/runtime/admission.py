"""SGLang's own requests, checked before any of them reaches the scheduler.

Every route that generates or embeds ends in ``TokenizerManager.generate_request``: what can be
known there is checked there, what depends on the tokens once they are known. SGLang's routes
answer a refusal with 400.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from fastapi import HTTPException
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.sampling.sampling_params import SamplingParams

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.runtime import isolation
from stateful_sglang.session import bounds

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_DETOKENIZE = "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize"
_OLLAMA = "sglang.srt.entrypoints.ollama.serving.OllamaServing"
_OLLAMA_HANDLERS = ("handle_chat", "handle_generate")
ATTACHMENTS = (
    Attachment(
        f"{_MANAGER}.generate_request",
        "hook",
        "the one door of all that is generated or embedded: numbers are bounded there",
    ),
    Attachment(
        f"{_MANAGER}._create_tokenized_object",
        "hook",
        "positions in a prompt are checked against its length",
    ),
    Attachment(
        f"{_DETOKENIZE}._convert_to_internal_request",
        "hook",
        "token ids to detokenize are bounded: the only data that passes no scheduler",
    ),
    *(
        Attachment(
            f"{_OLLAMA}.{name}",
            "hook",
            "its own refusals, which it catches nowhere, are answered with 400",
        )
        for name in _OLLAMA_HANDLERS
    ),
    Attachment(
        "sglang.srt.managers.io_struct.GenerateReqInput",
        "subclass",
        "the fields of a request that the table of bounds knows",
    ),
    Attachment(
        "sglang.srt.sampling.sampling_params.SamplingParams",
        "subclass",
        "the sampling parameters that the table of bounds knows",
    ),
)

_INTERNAL = frozenset(
    {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
)
"""Fields that SGLang fills in itself: given by a client, they would skip its own checks."""
_SAMPLING_NAMES = frozenset(SamplingParams.__struct_fields__) - _INTERNAL
_TEXTS = ("json_schema", "regex", "ebnf", "structural_tag")
_TEXT_LISTS = ("stop", "stop_regex")
_SWITCHES = (
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
)
_MAPPINGS = ("logit_bias", "custom_params")
_ALIASES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
}
"""Names under which SGLang's OpenAI routes take a parameter."""
_SESSION_FIELDS: Mapping[str, type] = {
    "id": str,
    "rid": str,
    "offset": int,
    "replace": bool,
    "drop_previous_output": bool,
}
_REQUIRED = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask")
_NESTED = ("token_ids_logprob", "multi_item_delimiter_indices", "token_indices_to_pool")
_PER_PROMPT = (
    *_REQUIRED,
    *_NESTED,
    "sampling_params",
    "sampling_logprobs_mode",
    "return_hidden_states",
    "lora_path",
    "custom_logit_processor",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
)
"""Fields that may be lists with a value a prompt; those nested are lists for each prompt."""
_POSITIONS = ("multi_item_delimiter_indices", "token_indices_to_pool")
_FLOAT16_MAX = 65504.0


class RefusedError(ValueError, HTTPException):
    """A request holds what the scheduler can't take: 400, naming the field.

    Two things in one, because SGLang's routes catch `ValueError` or nothing, and FastAPI answers
    an `HTTPException` that nobody caught.
    """

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, 400, message)
        self.args = (message,)

    def __str__(self) -> str:
        return str(self.detail)


def attach() -> None:
    """Register the hooks; SGLang applies them when all plugins have run."""
    HookRegistry.register(f"{_MANAGER}.generate_request", _checked_request, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}._create_tokenized_object", _check_positions, HookType.BEFORE)
    HookRegistry.register(
        f"{_DETOKENIZE}._convert_to_internal_request", _check_detokenize, HookType.BEFORE
    )
    for name in _OLLAMA_HANDLERS:
        HookRegistry.register(f"{_OLLAMA}.{name}", _refusing, HookType.AROUND)


def check(obj: Any, *, vocab_size: int, hidden_size: int) -> None:
    """Refuse a request to generate or embed that holds what the scheduler can't take.

    Args:
        obj: SGLang's ``GenerateReqInput`` or ``EmbeddingReqInput``, not normalised yet.

    Raises:
        RefusedError: Names the field, its value and what was expected.
    """
    for name, bound in bounds.REQUEST.items():
        if (value := getattr(obj, name, None)) is not None:
            _require(bounds.problem_of(name, value, bound, vocab_size))
    for name in ("input_ids", *_NESTED):
        if isinstance(value := getattr(obj, name, None), int):
            raise RefusedError(f"{name}: {value} is no list; expected a list of integers")
    given = obj.sampling_params
    for params in given if isinstance(given, list) else [given]:
        if params is not None:
            _check_sampling(params, vocab_size)
    if isinstance(given, list) and not given:
        raise RefusedError(
            "sampling_params: [] can't be used; expected one object a prompt, or none"
        )
    _check_batch(obj)
    if (session := getattr(obj, "session_params", None)) is not None:
        _check_session(session)
    for name in ("positional_embed_overrides", "embed_overrides"):
        _check_overrides(name, getattr(obj, name, None))
    if obj.input_embeds is not None:
        _check_embeds(obj.input_embeds, hidden_size)


def _check_sampling(params: Any, vocab_size: int) -> None:
    if not isinstance(params, Mapping):
        raise RefusedError(f"sampling_params: expected an object, not {type(params).__name__}")
    if unknown := sorted(map(str, params.keys() - _SAMPLING_NAMES)):
        raise RefusedError(f"sampling_params.{unknown[0]}: no sampling parameter of that name")
    for name, value in params.items():
        if value is None:
            continue
        called = f"sampling_params.{name}"
        if name in _ALIASES:
            called += f" ({_ALIASES[name]})"
        if name in _MAPPINGS and not isinstance(value, Mapping):
            raise RefusedError(f"{called}: expected an object, not {type(value).__name__}")
        if name == "stop_token_ids":
            _check_stop_tokens(called, value)
        if name in bounds.SAMPLING:
            _require(bounds.problem_of(called, value, bounds.SAMPLING[name], vocab_size))
            if isinstance(value, list | Mapping) and name not in (*_MAPPINGS, "stop_token_ids"):
                raise RefusedError(f"{called}: expected one number, not {type(value).__name__}")
        elif name in _TEXTS and not isinstance(value, str):
            raise RefusedError(f"{called}: expected a string, not {type(value).__name__}")
        elif name in _TEXT_LISTS and not _is_text_list(value):
            raise RefusedError(f"{called}: expected a string or a list of strings")
        elif name in _SWITCHES and not isinstance(value, bool):
            raise RefusedError(f"{called}: expected true or false, not {type(value).__name__}")


def _check_stop_tokens(called: str, value: Any) -> None:
    if not isinstance(value, list | tuple | set) or len(value) > bounds.MAX_STOP_TOKENS:
        raise RefusedError(
            f"{called}: expected a list of at most {bounds.MAX_STOP_TOKENS} token ids"
        )


def _is_text_list(value: Any) -> bool:
    texts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(each, str) for each in texts)


def _batch_size(obj: Any) -> int | None:
    """Prompts of a batch; None for one prompt that comes alone."""
    if obj.text is not None:
        return len(obj.text) if isinstance(obj.text, list) else None
    if obj.input_ids is not None:
        return len(obj.input_ids) if obj.input_ids and _is_list(obj.input_ids[0]) else None
    embeds = obj.input_embeds
    if not embeds or not _is_list(embeds[0]) or not embeds[0] or not _is_list(embeds[0][0]):
        return None
    return len(embeds)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _check_batch(obj: Any) -> None:
    """Lists that hold a value a prompt: SGLang takes them on trust, and dies of a wrong length."""
    batch = _batch_size(obj)
    for name in _PER_PROMPT:
        value = getattr(obj, name, None)
        if name in _NESTED and not (isinstance(value, list) and value and _is_list(value[0])):
            continue
        if not isinstance(value, list):
            continue
        if batch is None:
            raise RefusedError(f"{name}: a list for one prompt; expected one value")
        if len(value) != batch:
            raise RefusedError(f"{name}: {len(value)} values for {batch} prompts; expected as many")
        if name in _REQUIRED and not all(isinstance(each, int) for each in value):
            raise RefusedError(f"{name}: null or a list for a prompt; expected a value for each")
    given = obj.sampling_params
    copies = ((given[0] if isinstance(given, list) else given) or {}).get("n") or 1
    if copies > 1 and copies * (batch or 1) > bounds.MAX_FAN_OUT:
        raise RefusedError(
            f"sampling_params.n: {copies} answers to each of {batch} prompts; expected at most "
            f"{bounds.MAX_FAN_OUT} in all"
        )


def _check_session(session: Any) -> None:
    if not isinstance(session, Mapping):
        raise RefusedError(f"session_params: expected an object, not {type(session).__name__}")
    for name, value in session.items():
        kind = _SESSION_FIELDS.get(name)
        if kind is None:
            raise RefusedError(f"session_params.{name}: no field of that name")
        if value is not None and not isinstance(value, kind):
            raise RefusedError(f"session_params.{name}: expected {kind.__name__}")
    offset = session.get("offset")
    _require(bounds.problem_of("session_params.offset", offset, bounds.SESSION_OFFSET, 0))


def _check_overrides(name: str, value: Any) -> None:
    # Python callers of the engine give tensors here; what JSON can give would crash later.
    if _is_json(value):
        raise RefusedError(f"{name}: not available over HTTP")


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_json, value))
    return isinstance(value, dict | str | int | float)


def _check_embeds(embeds: Any, hidden_size: int) -> None:
    try:
        batches = [embeds] if np.ndim(embeds[0]) == 1 else embeds
        arrays = [np.asarray(each, dtype=np.float64) for each in batches]
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise RefusedError(
            f"input_embeds: expected rows of {hidden_size} numbers: {error}"
        ) from error
    for at, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != hidden_size or not len(array):
            raise RefusedError(
                f"input_embeds: prompt {at} has the shape {array.shape}; expected rows of "
                f"{hidden_size} numbers"
            )
        if not np.abs(array).max() <= _FLOAT16_MAX:
            raise RefusedError(f"input_embeds: expected numbers of at most {_FLOAT16_MAX}")


def _require(problem: str | None) -> None:
    if problem is not None:
        raise RefusedError(problem)


def _checked_request(
    generate_request: Callable[..., AsyncIterator[Any]],
    manager: Any,
    obj: Any,
    request: Any = None,
) -> AsyncIterator[Any]:
    """SGLang's generator itself where the request is good, so that a chunk costs nothing more."""
    config = manager.model_config
    if isinstance(obj.input_ids, Mapping):
        # What transformers 5 returns of a rendered chat; SGLang's Ollama route expects the ids.
        obj.input_ids = obj.input_ids["input_ids"]
    try:
        check(obj, vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        batch = _batch_size(obj)
        _require(isolation.id_problem(obj, batch))
        _require(isolation.problem(obj, manager))
    except RefusedError as error:
        return _refuse(error)
    names = isolation.under_own_ids(obj, batch, request)
    outputs = generate_request(manager, obj, request)
    return isolation.as_named(outputs, names) if names else outputs


async def _refusing(handle: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    try:
        return await handle(*args, **kwargs)
    except RefusedError:
        raise
    except ValueError as error:
        raise RefusedError(str(error)) from error


async def _refuse(error: RefusedError) -> AsyncIterator[Any]:
    raise error
    yield  # a generator, as its caller expects


def _check_positions(
    _manager: Any, obj: Any, _input_text: Any, input_ids: Any, *_args: Any, **_kwargs: Any
) -> None:
    last = len(input_ids or ()) - 1
    for name in _POSITIONS:
        if (value := getattr(obj, name, None)) is not None:
            if not _is_list(value) or any(map(_is_list, value)):
                raise RefusedError(f"{name}: expected a list of integers for each prompt")
            _require(bounds.problem_of(name, value, bounds.Bound(0, last), 0))
    start = getattr(obj, "routed_experts_start_len", 0)
    _require(bounds.problem_of("routed_experts_start_len", start, bounds.Bound(0, last + 1), 0))


def _check_detokenize(_serving: Any, request: Any, _raw_request: Any = None) -> None:
    vocab_size = _serving.tokenizer_manager.model_config.vocab_size
    bound = bounds.REQUEST["input_ids"]
    _require(bounds.problem_of("tokens", request.tokens, bound, vocab_size))
