"""The command `stateful-sglang`. Each subcommand imports what it needs, so that help is instant and
the doctor can tell what is broken."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stateful_sglang.runtime.options import declared
from stateful_sglang.server import journal_cli
from stateful_sglang.tenants.commands import app as keys

app = typer.Typer(
    name="stateful-sglang",
    help="Conversations that live on the server: SGLang in which a turn costs what is new.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys)
app.add_typer(journal_cli.app, name="journal")
_CACHE_DIR = next(each for each in declared() if each.name == "cache_dir")
CacheDir = Annotated[
    Path | None,
    typer.Option(_CACHE_DIR.flag, help=f"{_CACHE_DIR.help}.", show_default=False),
]


class ModelAction(StrEnum):
    """What `stateful-sglang model` can do."""

    PATH = "path"
    ENSURE = "ensure"
    VERIFY = "verify"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from stateful_sglang import SGLANG_VERSION, __version__

        print(f"stateful-sglang {__version__} for sglang {SGLANG_VERSION}")
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Start the server; takes every argument of SGLang's and ours (serve --help)."""
    from stateful_sglang.launch import main as launch

    raise typer.Exit(launch(context.args))


@app.command()
def doctor(
    port: Annotated[
        int | None,
        typer.Option(
            help="Where a server would listen; 0 for any free port.",
            show_default="the server's default",
            min=0,
            max=65535,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="WHEEL_OR_FOLDER",
            help="Check nothing here; compare every attachment with this release of SGLang.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check everything a server needs; exit status 1 with the remedy when something would fail."""
    if against is not None:
        raise typer.Exit(_compare_with(against))
    from stateful_sglang import doctor as examination
    from stateful_sglang.server.address import DEFAULT_PORT

    checks = examination.examine(DEFAULT_PORT if port is None else port, cache_dir)
    findings = examination.render(checks)
    raise typer.Exit(0 if examination.healthy(findings) else 1)


def _compare_with(release: Path) -> int:
    from stateful_sglang.attachments import against
    from stateful_sglang.attachments.sources import ReleaseError, open_release

    try:
        other = open_release(release)
        rows = against.compare(other)
    except ReleaseError as error:
        print(f"stateful-sglang: {error}", file=sys.stderr)
        return 1
    print(against.report(rows, other.name))
    return 0 if all(row.verdict == "holds" for row in rows) else 1


@app.command()
def model(
    action: Annotated[ModelAction, typer.Argument(help="ensure converts; verify checks SHA-256.")],
    cache_dir: CacheDir = None,
) -> None:
    """The embedded default model: where it is, convert it now, or check it."""
    from stateful_sglang.embedded import cache as models

    if action is ModelAction.PATH:
        print(models.model_path(cache_dir))
        return
    if action is ModelAction.ENSURE:
        try:
            path = _ensure(cache_dir)
        except models.ModelError as error:
            print(f"stateful-sglang: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        print(path)
        return
    state = models.check(cache_dir, hashes=True)
    if state.problem is not None:
        print(f"{state.path}: {state.problem}", file=sys.stderr)
        print("`stateful-sglang model ensure` converts it (again)", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{state.path}: every file has its recorded SHA-256")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def sessions(context: typer.Context) -> None:
    """The sessions of a running server: ls, show, fork, rollback, close, tail, export, import."""
    from stateful_sglang.client.terminal import app as commands

    commands(context.args, prog_name="stateful-sglang sessions")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def prefixes(context: typer.Context) -> None:
    """System prompts that all tenants of a running server share: add, ls, rm."""
    from stateful_sglang.client.prefixes_terminal import app as commands

    commands(context.args, prog_name="stateful-sglang prefixes")


def _ensure(cache_dir: Path | None) -> Path:
    from stateful_sglang.embedded import cache as models

    if not sys.stderr.isatty():
        return models.ensure_default_model(cache_dir)
    from rich.console import Console

    with Console(stderr=True).status("checking the model cache") as status:
        return models.ensure_default_model(cache_dir, say=status.update)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
