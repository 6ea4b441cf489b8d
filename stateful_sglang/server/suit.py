"""What a server without a GPU, and one with sessions, need SGLang to be told."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from stateful_sglang.runtime.options import Options
from stateful_sglang.server import cpu_settings as device
from stateful_sglang.server import machine, model, suitability
from stateful_sglang.server.errors import LaunchError

Setting = int | float | str | bool


def for_cpu(
    given: Mapping[str, Any],
    added: dict[str, Setting],
    *,
    int8: bool = False,
    sessions: bool = False,
) -> str:
    """Add CPU settings, set the thread count of the processes to come, and describe both.

    Raises:
        LaunchError: The model or the memory will not do, or int8 was asked for without kernels.
    """
    from stateful_sglang.cpu import extension, platform

    platform.prepare()
    path = str(given.get("model_path") or added["model_path"])
    dtype = str(given.get("dtype", "bfloat16"))
    config = model.configuration(path)
    lacking = suitability.refusal_on_cpu(
        config, sessions=sessions, real_kernels=platform.has_real_sgl_kernel()
    )
    if lacking is not None:
        raise LaunchError(f"--model-path {path}: {lacking}")
    try:
        shape = device.model_shape(
            suitability.with_defaults(config),
            model.stored_bytes(path),
            "bfloat16" if dtype == "auto" else dtype,
        )
    except KeyError as error:
        raise LaunchError(
            f"--model-path {path}: its config.json has no {error.args[0]}, by which a model of "
            "attention layers is sized, and its model_type "
            f"({config.get('model_type', 'not given')}) has no default for it. Give it there"
        ) from error
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    here = machine.probe()
    build_kernels()
    kernels = extension.status()
    if kernels.isa is not None:
        shape = dataclasses.replace(shape, packed_bytes=shape.packed_size(int8=int8))
    elif int8:
        raise LaunchError(
            f"--cpu-quant int8 needs the compiled kernels, and there are none: {kernels.detail}. "
            "Leave it out, or mend that"
        )
    try:
        choices = device.choose(
            here,
            shape,
            device.Wanted(
                context_length=given.get("context_length"),
                max_total_tokens=given.get("max_total_tokens"),
                max_running_requests=given.get("max_running_requests"),
                threads=int(threads) if threads.isdigit() else None,
            ),
        )
    except device.NotEnoughMemoryError as error:
        raise LaunchError(str(error)) from error
    if not threads.isdigit():
        os.environ["OMP_NUM_THREADS"] = str(choices["threads"].value)
    # Eager passes on a CPU need no buffers of fixed address; the copies are 2 % of a decode step.
    os.environ.setdefault("SGLANG_EAGER_INPUT_NO_COPY", "1")
    for name, choice in choices.items():
        if name != "threads" and name not in given:
            added[name] = choice.value
    isa = kernels.isa or "none, slower"
    return device.describe(choices, given, here, ("kernels", isa, kernels.detail))


def build_kernels() -> None:
    """Compile the kernels if this is their first time."""
    from stateful_sglang.cpu import extension

    if os.environ.get(extension.ISA_ENV) != "off":
        with contextlib.suppress(extension.BuildError):  # `status` gives the reason and the remedy
            extension.build(lambda line: print(line, file=sys.stderr, flush=True))


def for_crashes(given: Mapping[str, Any]) -> None:
    """Have SGLang wait for no core dump of a GPU that can't be written.

    When one of its processes dies and a scheduler lives, its API process would wait a minute for
    one, deaf to everybody, before it ends and can be started again.
    """
    asked = os.environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP") == "1"
    if not asked and not given.get("crash_dump_folder"):  # with a folder SGLang asks for dumps
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")


def for_sessions(options: Options, given: Mapping[str, Any], added: dict[str, Setting]) -> None:
    """Add what sessions and drafts need SGLang to be told.

    Drafts are told here as well as in the algorithm's own hook, because SGLang sizes its memory
    before it calls that.
    """
    added["radix_cache_backend"] = "cardinal"
    if options.metrics and "enable_metrics" not in given:
        added["enable_metrics"] = True
    if options.dropin != "off":
        _add_parsers(given, added)
    if options.draft == "off" or "speculative_algorithm" in given:
        return
    added["speculative_algorithm"] = "PROMPT_LOOKUP"
    added["speculative_num_steps"] = options.max_draft
    added["speculative_num_draft_tokens"] = options.max_draft + 1
    added["speculative_eagle_topk"] = 1


def _add_parsers(given: Mapping[str, Any], added: dict[str, Setting]) -> None:
    """Have calls and reasoning found in answers by what SGLang reads off the model's template.

    The embedded model has a template without calls; it was trained to write them as Hermes does.
    """
    embedded = "model_path" not in given
    if "tool_call_parser" not in given:
        added["tool_call_parser"] = "hermes" if embedded else "auto"
    if "reasoning_parser" not in given and not embedded:
        added["reasoning_parser"] = "auto"
