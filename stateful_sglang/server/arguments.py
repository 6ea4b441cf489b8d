"""Settle SGLang's arguments: what the user gave, then what being stateful and this machine ask for.

Whatever the user gave wins, except where it contradicts ``--stateful on``, which is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateful_sglang import loopback
from stateful_sglang.embedded import cache as model
from stateful_sglang.runtime.config import PluginConfig
from stateful_sglang.server import conflicts, machine, quiet, suitability
from stateful_sglang.server import cpu_settings as device

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 30000

Setting = int | float | str | bool


class LaunchError(Exception):
    """Something the user can mend; the message says what was wrong, expected, and to be done."""


def settle(
    ours: argparse.Namespace, config: PluginConfig, theirs: list[str]
) -> tuple[Any, PluginConfig]:
    """Make SGLang's ``ServerArgs``; publish our settings to this process and those to come.

    Raises:
        LaunchError: An argument, the model, the port or the memory will not do.
    """
    from stateful_sglang.cpu import platform

    if ours.cache_dir is not None:
        os.environ[model.CACHE_ENV] = str(ours.cache_dir.expanduser().absolute())
    config.to_env()
    quiet.install()
    prepared = platform.prepare()
    if prepared.cpu_engine:
        _build_kernels()  # Aloud: loading our plugin would do it without a word.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    given, argv = given_arguments(theirs)
    check_modes(given, config)
    added: dict[str, Setting] = {}
    if config.quiet and not quiet.wanted(given):  # the level was written in another way
        config = dataclasses.replace(config, quiet=False)
        config.to_env()
    if config.quiet:
        added["log_level"] = quiet.LEVEL
    if "model_path" not in given:
        added["model_path"] = str(_default_model(ours.cache_dir))
    else:
        check_model(given["model_path"], given.get("load_format", "auto"))
    check_port(given, added)
    report = ""
    if prepared.cpu_engine and given.get("device", "cpu") == "cpu":
        report = suit_cpu(given, added, int8=config.cpu_quant == "int8", sessions=config.stateful)
    elif config.cpu_quant != "off":
        raise LaunchError(
            f"--cpu-quant {config.cpu_quant} is for a server without a GPU; this one runs on "
            f"{given.get('device', 'an accelerator')}. Leave it out, or use SGLang's own "
            "--quantization"
        )
    if config.stateful:
        suit_sessions(config, given, added)
    server_args = _server_args(argv + _flags(added))
    # Where SGLang's server will be asked, and asks itself, is no business of a proxy.
    loopback.spare(os.environ, str(given.get("host", DEFAULT_HOST)))
    if report and config.quiet:
        print(report, file=sys.stderr, flush=True)
    elif report:
        logger.info("%s", report)
    return server_args, config


def given_arguments(theirs: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the user gave, by argument name; and the command line with a --config file merged in."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = _SGLangParser(prog="sglang", allow_abbrev=True)
    ServerArgs.add_cli_args(parser)
    argv = spell_out_config(theirs)
    if "--config" in argv:
        try:
            argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
        except (ValueError, OSError) as error:
            raise LaunchError(f"--config: {error}") from error
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    given = vars(parser.parse_args(argv))
    if given.pop("config", None) is not None:
        raise LaunchError(
            "--config was shortened, and SGLang reads a configuration file only where it is "
            "written out. Write --config FILE"
        )
    return given, argv


def spell_out_config(theirs: list[str]) -> list[str]:
    """``--config=FILE`` as two words: SGLang passes over the file in the other spelling."""
    argv: list[str] = []
    for word in theirs:
        name, equals, value = word.partition("=")
        argv += ["--config", value] if equals and name == "--config" else [word]
    return argv


class _SGLangParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise LaunchError(
            f"{message}. Arguments are those of python -m stateful_sglang.launch --help and of "
            "python -m sglang.launch_server --help"
        )


def check_modes(given: Mapping[str, Any], config: PluginConfig) -> None:
    """Refuse arguments that ask for another kind of server, or contradict sessions.

    Raises:
        LaunchError: Names the argument and the reason.
    """
    other = conflicts.first(conflicts.OTHER_SERVERS, given)
    if other is not None:
        raise LaunchError(
            f"{_flag(other.name)} is for another kind of server: {other.reason}, and this launcher "
            "SGLang's Python HTTP server. Use python -m sglang.launch_server for it"
        )
    if conflicts.plugin_left_out(os.environ):
        raise LaunchError(
            f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves out our plugin, without which "
            "this would be another server. Add stateful_sglang to it, or unset it"
        )
    if not config.stateful:
        return
    variable = conflicts.first(conflicts.VARIABLES, os.environ)
    if variable is not None:
        raise LaunchError(
            f"{variable.name}={os.environ[variable.name]} cannot be combined with sessions: "
            f"{variable.reason}. Unset it, or add --stateful off"
        )
    conflict = conflicts.first(conflicts.ARGUMENTS, given)
    if conflict is not None:
        value = given[conflict.name]
        shown = _flag(conflict.name) + ("" if value is True else f" {value}")
        raise LaunchError(
            f"{shown} cannot be combined with sessions: {conflict.reason}. Leave it out, or add "
            "--stateful off"
        )


def _default_model(cache_dir: Path | None) -> Path:
    try:
        return model.ensure_default_model(cache_dir)
    except model.ModelError as error:
        raise LaunchError(str(error)) from error


def check_port(given: Mapping[str, Any], added: dict[str, Setting]) -> None:
    """Settle the host, and look whether the server could listen at host and port.

    Raises:
        LaunchError: It could not.
    """
    host, port = given.get("host", DEFAULT_HOST), given.get("port", DEFAULT_PORT)
    if "host" not in given:
        added["host"] = DEFAULT_HOST
    problem = machine.port_problem(host, port)
    if problem is not None:
        raise LaunchError(
            f"cannot listen on {host}:{port}: {problem}. Stop what is using the port, or choose "
            "another with --port"
        )


def check_model(path: str, load_format: str) -> None:
    """Look whether a local model is there, with weights; names of the hub are left to SGLang.

    Raises:
        LaunchError: It is not.
    """
    if "://" in path:
        return
    is_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") != 1
    if is_local and not Path(path).exists():
        raise LaunchError(
            f"--model-path {path} does not exist; expected a folder with config.json, tokenizer "
            "and weights, or the name of a model on the Hugging Face hub. Leave it out to serve "
            "the embedded default model"
        )
    if Path(path).is_dir() and _stored_bytes(path) is None and load_format != "dummy":
        raise LaunchError(
            f"--model-path {path} holds no weights; expected {' or '.join(_WEIGHT_FILES)}. Copy "
            "them there, or download the model again"
        )


def suit_cpu(
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
    config = model_config(path)
    lacking = suitability.refusal_on_cpu(
        config, sessions=sessions, real_kernels=platform.has_real_sgl_kernel()
    )
    if lacking is not None:
        raise LaunchError(f"--model-path {path}: {lacking}")
    try:
        shape = device.model_shape(
            suitability.with_defaults(config),
            _stored_bytes(path),
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
    _build_kernels()
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


def _build_kernels() -> None:
    """Compile the kernels if this is their first time."""
    from stateful_sglang.cpu import extension

    if os.environ.get(extension.ISA_ENV) != "off":
        with contextlib.suppress(extension.BuildError):  # `status` gives the reason and the remedy
            extension.build(lambda line: print(line, file=sys.stderr, flush=True))


def model_config(path: str) -> Mapping[str, Any]:
    """A model's ``config.json``, downloaded where the model is on the hub.

    Raises:
        LaunchError: There is none, or it cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"--model-path {path} has no readable config.json: {str(error).splitlines()[0]}. "
            "Expected a folder with config.json, tokenizer and weights, or a model that can be "
            "downloaded"
        ) from error
    if not config:
        raise LaunchError(f"--model-path {path} has no config.json; expected a model's folder")
    return config


def _stored_bytes(path: str) -> int | None:
    folder = Path(path)
    if not folder.is_dir():
        return None
    for pattern in _WEIGHT_FILES:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def suit_sessions(
    config: PluginConfig, given: Mapping[str, Any], added: dict[str, Setting]
) -> None:
    """Add what sessions and drafts need SGLang to be told.

    Drafts are told here as well as in the algorithm's own hook, because SGLang sizes its memory
    before it calls that.
    """
    added["radix_cache_backend"] = "cardinal"
    if config.draft == "off" or "speculative_algorithm" in given:
        return
    added["speculative_algorithm"] = "PROMPT_LOOKUP"
    added["speculative_num_steps"] = config.max_draft
    added["speculative_num_draft_tokens"] = config.max_draft + 1
    added["speculative_eagle_topk"] = 1


def _server_args(argv: list[str]) -> Any:
    from sglang.srt.server_args import prepare_server_args

    try:
        server_args = prepare_server_args(argv)
        server_args.resolve_once()
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        reason = str(error) or f"{type(error).__name__} without a message"
        raise LaunchError(f"SGLang refused these arguments: {reason}") from error
    return server_args


def _flags(settings: Mapping[str, Setting]) -> list[str]:
    argv = []
    for name, value in settings.items():
        argv += [_flag(name)] if value is True else [_flag(name), str(value)]
    return argv


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
