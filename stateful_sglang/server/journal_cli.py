"""The commands `stateful-sglang journal ...`. What they need is imported when one runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from stateful_sglang.runtime.options import declared

app = typer.Typer(
    help="The file that sessions are recorded in: check it, shrink it, read it out.",
    no_args_is_help=True,
    add_completion=False,
)
_OPTIONS = {each.name: each for each in declared()}
JournalPath = Annotated[
    Path | None,
    typer.Option(
        _OPTIONS["journal"].flag,
        metavar="PATH",
        help="The file; by default the one in the cache folder.",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        _OPTIONS["cache_dir"].flag, help=f"{_OPTIONS['cache_dir'].help}.", show_default=False
    ),
]


@app.command()
def check(journal: JournalPath = None, cache_dir: CacheDir = None) -> None:
    """Read all of it, also while a server runs; exit status 1 with the remedy for damage."""
    from rich.console import Console
    from rich.table import Table

    from stateful_sglang.session.journal import maintenance

    path = _path(journal, cache_dir)
    with _told_errors():
        report = maintenance.check(path)
    table = Table(title=str(path), title_justify="left", show_header=False)
    for name, value in report.facts.items():
        table.add_row(name, f"{value:,}")
    if report.held_by is not None:
        table.add_row("in use", report.held_by.partition(" is in use by ")[2])
    table.add_row("sound", "no" if report.problems else "yes")
    Console(soft_wrap=True).print(table)
    if not report.problems:
        return
    for problem in report.problems:
        print(problem, file=sys.stderr)
    print(
        f"to go on without what is damaged: stop the server, save what can be read with "
        f"`stateful-sglang journal export FILE --journal {path}`, move {path} away, and start the "
        "server, which makes a new one",
        file=sys.stderr,
    )
    raise typer.Exit(1)


@app.command()
def vacuum(journal: JournalPath = None, cache_dir: CacheDir = None) -> None:
    """Forget what is over and give free room back; not while a server runs."""
    from stateful_sglang.session.journal import maintenance

    path = _path(journal, cache_dir)
    with _told_errors():
        shrunk = maintenance.vacuum(path)
    print(f"{path}: {shrunk.before:,} bytes before, {shrunk.after:,} now")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to write; - is the standard output.")],
    journal: JournalPath = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write every session with its messages, a line of JSON each; not while a server runs."""
    from stateful_sglang.session.journal import maintenance

    lines = damaged = 0
    with _told_errors():
        found = maintenance.export(_path(journal, cache_dir))
        out = sys.stdout if str(file) == "-" else _private(file)
        try:
            for session in found:
                print(json.dumps(session), file=out)
                lines += 1
                damaged += "error" in session
        finally:
            if out is not sys.stdout:
                out.close()
    print(f"{lines} sessions, {damaged} of them damaged", file=sys.stderr)
    if damaged:
        raise typer.Exit(1)


def _path(journal: Path | None, cache_dir: Path | None) -> Path:
    from stateful_sglang.server.journal import path_of

    path = path_of(None if journal is None else str(journal.absolute()), cache_dir)
    assert path is not None
    return path


def _private(file: Path) -> TextIO:
    """A file to write conversations to, for its owner alone."""
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8")


@contextmanager
def _told_errors() -> Iterator[None]:
    """End the command with a line and status 1 where the journal, or the file, will not do."""
    from stateful_sglang.session.journal.base import JournalError

    try:
        yield
    except (JournalError, OSError) as error:
        print(f"stateful-sglang: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
