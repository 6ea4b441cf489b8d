"""The command line: our options taken out, as `stateful_sglang.runtime.options` declares them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from stateful_sglang.runtime.declarations import Declared, OptionError
from stateful_sglang.runtime.options import Options, declared
from stateful_sglang.server.address import DEFAULT_HOST, DEFAULT_PORT
from stateful_sglang.server.errors import LaunchError


class Parser(argparse.ArgumentParser):
    """A parser that raises `LaunchError` instead of ending the process."""

    def __init__(self, *, see: str, **arguments: Any) -> None:
        """`see` is the end of each error: where the right arguments are listed."""
        super().__init__(**arguments)
        self._see = see

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            LaunchError: Always.
        """
        raise LaunchError(f"{message}. {self._see}")


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Split the command line into ours and SGLang's.

    Raises:
        LaunchError: An option of ours does not take its value.
    """
    ours, theirs = _ours().parse_known_args(argv)
    try:
        return Options(**vars(ours)), theirs
    except OptionError as error:
        raise LaunchError(str(error)) from error


def _ours() -> Parser:
    parser = Parser(
        see="See python -m stateful_sglang.launch --help",
        prog="python -m stateful_sglang.launch",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Start SGLang's server with sessions that live on the server.",
        epilog="Every other argument is SGLang's: see python -m sglang.launch_server --help. "
        f"The server listens on {DEFAULT_HOST}:{DEFAULT_PORT} unless told otherwise.",
    )
    for each in declared():
        if each.option.settable:
            _add(parser, each)
    return parser


def _add(parser: Parser, each: Declared) -> None:
    text = each.help
    if each.shown_default:
        text += f" (default: {each.shown_default}{each.option.default_note})"
    more: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": each.option.metavar}
    if each.kind is bool:
        more["action"] = _OnOff
        if not each.default:  # The flag alone says enough.
            more |= {"nargs": "?", "const": "on"}
    elif each.kind is tuple:
        more["action"] = _Words
    else:
        more["type"] = each.kind
    parser.add_argument(each.flag, dest=each.name, choices=each.choices, **more)


class _OnOff(argparse.Action):
    """``on`` and ``off`` as a bool; the choices are checked before."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values == "on")


class _Words(argparse.Action):
    """Words with commas between them, or the option several times."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        words = (word.strip() for word in values.split(","))
        so_far = getattr(namespace, self.dest, ())
        setattr(namespace, self.dest, (*so_far, *filter(None, words)))
