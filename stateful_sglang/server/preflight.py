"""What can be told before SGLang and torch are imported, which takes some ten seconds.

Only arguments that are written out are looked at: SGLang's own parser, which knows abbreviations,
comes with the imports, and then everything is checked again.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

from stateful_sglang import SGLANG_VERSION
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import address, arguments, conflicts, isolation, journal, model
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.server.parser import Parser


def check(options: Options, theirs: list[str]) -> dict[str, Any]:
    """Refuse what needs no import to be refused; the arguments that were looked at.

    Raises:
        LaunchError: SGLang's release, the port, the journal, the model's folder or an argument
            will not do.
    """
    require_sglang()
    given = written_out(theirs)
    conflicts.check(given, options)
    if given.get("node_rank", 0) == 0:
        address.check(given)
        isolation.check(given, options)
        journal.check(options)
    if "model_path" in given:
        model.check(given["model_path"], given.get("load_format", "auto"))
    return given


def require_sglang() -> None:
    """Check that SGLang is there, in the release we attach to.

    Raises:
        LaunchError: It is not; the message has the remedy.
    """
    try:
        installed = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        installed = None
    if installed != SGLANG_VERSION:
        found = (
            "SGLang is not installed" if installed is None else f"SGLang {installed} is installed"
        )
        raise LaunchError(
            f"{found}; stateful_sglang works with exactly {SGLANG_VERSION}. Run scripts/install, "
            f"or pip install sglang=={SGLANG_VERSION}"
        )


def written_out(theirs: list[str]) -> dict[str, Any]:
    """The arguments checked here, as far as they are spelled in full; a --config file included.

    Raises:
        LaunchError: A port is no number.
    """
    parser = Parser(
        see="See python -m sglang.launch_server --help",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--node-rank", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    parser.add_argument("--grpc-port", type=int)
    parser.add_argument("--tokenizer-worker-num", type=int)
    parser.add_argument("--enable-response-store", action="store_true")
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--load-format")
    parser.add_argument("--log-level")
    parser.add_argument("--disable-radix-cache", action="store_true")
    parser.add_argument("--pipeline-parallel-size", "--pp-size", dest="pp_size", type=int)
    parser.add_argument("--data-parallel-size", "--dp-size", dest="dp_size", type=int)
    parser.add_argument("--disaggregation-mode")
    words = arguments.spell_out_config(theirs)
    given = vars(parser.parse_known_args(words)[0])
    file = given.pop("config", None)
    if file is None:
        return given
    return {**vars(parser.parse_known_args(_words_of(Path(file)))[0]), **given}


def _words_of(file: Path) -> list[str]:
    """A configuration file as a command line; empty where SGLang's parser will have to complain."""
    import yaml

    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(settings, dict):
        return []
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + str(name).replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, str | int) and value is not False:
            words += [flag, str(value)]
    return words
