"""Settings of a server without an accelerator, from what the machine has and the model needs.

`choose` is a pure function: same cores, memory and model, same settings. What the user gave is left
to the caller, who adds only settings that the user did not give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from stateful_sglang.server import suitability
from stateful_sglang.server.machine import Machine

_MIB = 1 << 20
_GIB = 1 << 30

PROCESS_OVERHEAD = 5 * _GIB // 2
"""Resident size of the server's three Python processes with torch and SGLang, and activations."""
POOL_SHARE = 0.5
"""Share of what is left after model and processes that the KV pool may take."""
POOL_TOKENS = 65_536
"""Tokens of KV that serve a handful of agents; SGLang zeroes the whole pool at start, so that more
would cost start-up time and memory whether used or not."""
POOL_CONTEXTS = 2
"""Full contexts the pool holds where the memory allows it, for models with longer contexts."""
MIN_CONTEXT = 1024
"""Tokens below which a server is not worth starting."""
BYTES_PER_THREAD = 8 * _MIB
"""Weights each thread should read in a step: below that, barriers cost more than they gain."""
CHUNKED_PREFILL = 2048
"""Tokens of a prompt computed before other requests get a step."""
TABLE_LIMIT = 64 * _MIB
"""Size limit of SGLang's request table, requests times context times 4 bytes."""
MAX_REQUESTS = 64
_POOL_ROUNDING = 256


class NotEnoughMemoryError(ValueError):
    """The model, its processes and the smallest useful KV pool do not fit."""


@dataclass(frozen=True)
class ModelShape:
    """What a model costs, from its configuration and files."""

    weight_bytes: int
    """In the dtype it is served in."""
    kv_bytes_per_token: int
    max_context: int
    """Positions the model was made for."""
    sliding_window: bool = False
    """Some layers see a window of the context only."""
    packed_bytes: int = 0
    """Of the weights' second copy, in the layout of the compiled kernels; 0 without those."""
    element_bytes: int = 2
    """Of a weight, in the dtype it is served in."""

    def packed_size(self, *, int8: bool) -> int:
        """Bytes of the second copy where there are kernels."""
        return self.weight_bytes // self.element_bytes if int8 else self.weight_bytes


@dataclass(frozen=True)
class Wanted:
    """What the user gave and the other settings have to fit; None where nothing was given."""

    context_length: int | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    threads: int | None = None


class Choice(NamedTuple):
    """One setting, and why."""

    value: int | float | str | bool
    reason: str


def choose(machine: Machine, model: ModelShape, wanted: Wanted) -> dict[str, Choice]:
    """Pick settings, by SGLang's argument names without dashes, plus ``threads``.

    Raises:
        NotEnoughMemoryError: Says what is needed and what there is.
    """
    pool = _pool_tokens(machine, model, wanted)
    context = _context_length(model, wanted, pool)
    choices = {
        "threads": _threads(machine, model, wanted),
        "device": Choice("cpu", "no accelerator was found"),
        "attention_backend": Choice(
            "torch_native", "the name SGLang runs without Triton; the code behind it is ours"
        ),
        "dtype": Choice("bfloat16", "half the memory traffic of float32"),
        "max_total_tokens": pool,
        "context_length": context,
        "max_running_requests": _max_running_requests(machine, wanted, context.value, pool.value),
        "chunked_prefill_size": Choice(
            CHUNKED_PREFILL, "others get a step between chunks of a long prompt"
        ),
        "disable_overlap_schedule": Choice(
            True, "overlapping costs a wasted step a request where one device does both"
        ),
        "sleep_on_idle": Choice(True, "an idle scheduler would otherwise spin on a whole core"),
        "mem_fraction_static": Choice(
            0.95, "the pool is set in tokens; this only has to exceed it"
        ),
    }
    if model.sliding_window:
        choices["disable_hybrid_swa_memory"] = Choice(
            True, "one pool for all layers; attention applies the window"
        )
    return choices


def model_shape(config: Mapping[str, Any], stored_bytes: int | None, dtype: str) -> ModelShape:
    """Read a Hugging Face configuration.

    Args:
        config: ``config.json``; the language model's part of it where the model has several.
        stored_bytes: Size of the weight files, None where they are not here yet.
        dtype: The dtype served.

    Raises:
        KeyError: The configuration lacks a field that every decoder has.
    """
    text = suitability.language_part(config)
    layers = _field(text, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _field(text, "hidden_size", "n_embd", "d_model")
    heads = _field(text, "num_attention_heads", "n_head", "num_heads")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    width = _dtype_bytes(dtype)
    if stored_bytes is None:
        inner = int(text.get("intermediate_size") or 4 * hidden)
        parameters = layers * (4 * hidden * hidden + 3 * hidden * inner)
        weights = (parameters + 2 * hidden * int(text["vocab_size"])) * width
    else:
        stored = text.get("torch_dtype") or text.get("dtype") or config.get("dtype") or dtype
        weights = stored_bytes * width // _dtype_bytes(str(stored))
    return ModelShape(
        weight_bytes=weights,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * width,
        max_context=int(text.get("max_position_embeddings") or text.get("n_positions") or 2048),
        sliding_window=bool(text.get("sliding_window") or text.get("attention_chunk_size")),
        element_bytes=width,
    )


def describe(
    choices: Mapping[str, Choice],
    given: Mapping[str, Any],
    machine: Machine,
    *facts: tuple[str, str, str],
) -> str:
    """One readable block: every setting, its value, and why; what the user gave is marked.

    Args:
        choices: As `choose` made them.
        given: What the user gave, by SGLang's names.
        machine: What they were chosen for.
        facts: Further rows: name, value, explanation.
    """
    lines = []
    width = max(len(_flag(name)) for name in choices) + 2
    threads = given.get("threads", choices["threads"].value)
    if machine.load > machine.cores and threads > 1:
        lines.append(
            f"{machine.load:.0f} other processes compete for {machine.cores} cores: the server's "
            "threads will wait for each other. OMP_NUM_THREADS=1 is faster while that lasts."
        )
    lines += [
        f"No accelerator: CPU settings for {machine.cores} cores and "
        f"{machine.free_memory / _GIB:.1f} GiB of free memory"
    ]
    for name, choice in choices.items():
        value, reason = (given[name], "given") if name in given else choice
        lines.append(f"  {_flag(name):<{width}}{value!s:<14}{reason}")
    lines += [f"  {name:<{width}}{value:<14}{reason}" for name, value, reason in facts]
    return "\n".join(lines)


def _flag(name: str) -> str:
    return "OMP_NUM_THREADS" if name == "threads" else "--" + name.replace("_", "-")


def _pool_tokens(machine: Machine, model: ModelShape, wanted: Wanted) -> Choice:
    weights = model.weight_bytes + model.packed_bytes
    fixed = weights + PROCESS_OVERHEAD
    spare = machine.free_memory - fixed
    need = wanted.max_total_tokens or wanted.context_length or MIN_CONTEXT
    if spare < need * model.kv_bytes_per_token:
        raise NotEnoughMemoryError(
            f"too little memory: the model's weights take {weights / _GIB:.1f} GiB, the server's "
            f"processes {PROCESS_OVERHEAD / _GIB:.1f} GiB and {need} tokens of KV "
            f"{need * model.kv_bytes_per_token / _GIB:.2f} GiB, but only "
            f"{machine.free_memory / _GIB:.1f} GiB are free. Free some memory, or serve a smaller "
            "model"
            + (" or a shorter context" if need > MIN_CONTEXT else "")
            + (
                ", or do without the compiled kernels' copy of the weights: "
                "STATEFUL_SGLANG_CPU_ISA=off."
                if model.packed_bytes
                else "."
            )
        )
    if wanted.max_total_tokens is not None:
        return Choice(wanted.max_total_tokens, "given")
    context = wanted.context_length or model.max_context
    fitting = max(int(spare * POOL_SHARE) // model.kv_bytes_per_token, need)
    tokens = min(fitting, max(POOL_TOKENS, POOL_CONTEXTS * context))
    rounded = max(tokens // _POOL_ROUNDING * _POOL_ROUNDING, need)
    size = rounded * model.kv_bytes_per_token / _GIB
    reason = (
        f"{rounded / context:.0f} full contexts, {size:.2f} GiB"
        if tokens < fitting
        else f"{POOL_SHARE:.0%} of the memory left after model and processes, {size:.2f} GiB"
    )
    return Choice(rounded, reason)


def _context_length(model: ModelShape, wanted: Wanted, pool: Choice) -> Choice:
    if wanted.context_length is not None:
        return Choice(wanted.context_length, "given")
    tokens = int(pool.value)
    if tokens < model.max_context:
        return Choice(tokens, f"all of the pool; the model could take {model.max_context}")
    return Choice(model.max_context, "all the positions the model has")


def _max_running_requests(machine: Machine, wanted: Wanted, context: Any, pool: Any) -> Choice:
    if wanted.max_running_requests is not None:
        return Choice(wanted.max_running_requests, "given")
    by_table = TABLE_LIMIT // (4 * int(context))
    by_cores = min(8 * machine.cores, MAX_REQUESTS)
    value = max(2, min(by_table, by_cores, int(pool) // 2))
    if by_table < by_cores:
        return Choice(value, "keeps the table of requests times context within 64 MiB")
    return Choice(value, "8 a core; more would only slow each other down")


def _threads(machine: Machine, model: ModelShape, wanted: Wanted) -> Choice:
    if wanted.threads is not None:
        return Choice(wanted.threads, "given")
    # The HTTP, tokenizer and detokenizer work needs a core only where there are cores to spare.
    available = machine.cores if machine.cores <= 4 else machine.cores - max(1, machine.cores // 16)
    useful = max(2, model.weight_bytes // BYTES_PER_THREAD)
    if useful < available:
        return Choice(useful, f"{BYTES_PER_THREAD // _MIB} MiB of weights a thread at least")
    spared = machine.cores - available
    return Choice(
        available, "every physical core" if not spared else f"{spared} left to HTTP and tokenizer"
    )


def _field(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name):
            return int(config[name])
    raise KeyError(names[0])


def _dtype_bytes(dtype: str) -> int:
    return 4 if dtype.removeprefix("torch.") in ("float32", "float") else 2
