"""Settle SGLang's arguments: what the user gave, then what being stateful and this machine ask for.

Whatever the user gave wins, except where it contradicts ``--stateful on``, which is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from stateful_sglang import cache_folder, loopback
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import address, conflicts, isolation, model, quiet, suit
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.server.parser import Parser
from stateful_sglang.server.suit import Setting

logger = logging.getLogger(__name__)


def settle(options: Options, theirs: list[str]) -> tuple[Any, Options]:
    """Make SGLang's ``ServerArgs``; publish our settings to this process and those to come.

    Raises:
        LaunchError: An argument, the model, the port or the memory will not do.
    """
    from stateful_sglang.cpu import platform

    if options.cache_dir is not None:
        os.environ[cache_folder.ENV] = str(options.cache_dir.expanduser().absolute())
    options.to_env()
    quiet.install()
    prepared = platform.prepare()
    if prepared.cpu_engine:
        suit.build_kernels()  # Aloud: loading our plugin would do it without a word.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    given, argv = given_arguments(theirs)
    conflicts.check(given, options)
    added: dict[str, Setting] = {}
    if options.quiet and not quiet.wanted(given):  # the level was written in another way
        options = dataclasses.replace(options, quiet=False)
        options.to_env()
    if options.quiet:
        added["log_level"] = quiet.LEVEL
    if "model_path" not in given:
        added["model_path"] = str(model.default(options.cache_dir))
    else:
        model.check(given["model_path"], given.get("load_format", "auto"))
    address.check(given)
    isolation.check(given, options)
    added |= address.default(given)
    suit.for_crashes(given)
    report = ""
    if prepared.cpu_engine and given.get("device", "cpu") == "cpu":
        report = suit.for_cpu(
            given, added, int8=options.cpu_quant == "int8", sessions=options.stateful
        )
    elif options.cpu_quant != "off":
        raise LaunchError(
            f"--cpu-quant {options.cpu_quant} is for a server without a GPU; this one runs on "
            f"{given.get('device', 'an accelerator')}. Leave it out, or use SGLang's own "
            "--quantization"
        )
    if options.stateful:
        suit.for_sessions(options, given, added)
    server_args = _server_args(argv + _flags(added))
    # Where SGLang's server will be asked, and asks itself, is no business of a proxy.
    loopback.spare(os.environ, str(given.get("host", address.DEFAULT_HOST)))
    if report and options.quiet:
        print(report, file=sys.stderr, flush=True)
    elif report:
        logger.info("%s", report)
    return server_args, options


def given_arguments(theirs: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the user gave, by argument name; and the command line with a --config file merged in."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = Parser(
        see="Arguments are those of python -m stateful_sglang.launch --help and of "
        "python -m sglang.launch_server --help",
        prog="sglang",
        allow_abbrev=True,
    )
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
        argv += [conflicts.flag(name)] if value is True else [conflicts.flag(name), str(value)]
    return argv
