"""Runs a bench: ``python -m bench NAME``; ``python -m bench --list`` tells which there are."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from bench import suites
from bench.harness.server import end_with_us


class _Benches(TyperGroup):
    """A command for each bench; one is imported only to be run or to tell its options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in order."""
        return suites.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The bench of that name, if there is one."""
        return _command(cmd_name) if cmd_name in suites.names() else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list that ``--list`` prints."""
        with formatter.section("Benches"):
            formatter.write_dl([(name, suites.description(name)) for name in suites.names()])


def _command(name: str) -> click.Command:
    module = importlib.import_module(f"bench.suites.{name}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help=_help(module.__doc__ or ""))(_exiting(module.main))
    return typer.main.get_command(app)


def _exiting(main: Callable[..., int | None]) -> Callable[..., None]:
    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(main(*args, **kwargs) or 0)

    return run


def _help(text: str) -> str:
    """A module's docstring in which indented paragraphs keep their lines."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else part for part in paragraphs)


app = typer.Typer(
    cls=_Benches, add_completion=False, rich_markup_mode=None, no_args_is_help=True, help=__doc__
)


def _list(wanted: bool) -> None:
    if wanted:
        width = max(map(len, suites.names()))
        for name in suites.names():
            print(f"{name:{width}}  {suites.description(name)}")
        raise typer.Exit


@app.callback()
def _options(
    listed: Annotated[
        bool, typer.Option("--list", help="Name all benches.", callback=_list, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line says; ends by `SystemExit` with the bench's exit status."""
    end_with_us()
    app(args=argv, prog_name="python -m bench")


if __name__ == "__main__":
    sys.exit(main())
