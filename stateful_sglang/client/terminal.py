"""``stateful-sglang sessions``: a server's sessions from a terminal.

Tables are for people. What a program reads is JSON with ``--json``, and without it, where standard
output is no terminal, one line a thing with tabs between its fields.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from stateful_sglang.client.connecting import ANY_ID, ApiKey, AsJson, Url, connected, failed
from stateful_sglang.client.errors import OtherModelError
from stateful_sglang.client.printing import (
    print_json,
    print_list,
    print_message,
    print_rows,
    said,
    shown,
)
from stateful_sglang.client.sync import DEFAULT_URL, Session
from stateful_sglang.client.types import ListOptions, State

app = typer.Typer(
    name="stateful-sglang sessions",
    help="The sessions of a running server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Id = Annotated[str, typer.Argument(metavar="ID", help="A session's id.", show_default=False)]

_COLUMNS = {
    "id": "id",
    "state": "state",
    "version": "version",
    "messages": "messages",
    "tokens": "tokens",
    "used": "used_at",
    "metadata": "metadata",
}
"""Of a list, by the field that each shows."""


@app.command()
def ls(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(help="Most sessions to list.", min=1)] = 100,
    state: Annotated[
        str, typer.Option(help="open, closed, expired or any.", metavar="STATE")
    ] = "open",
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only those with it; may be given again."),
    ] = None,
) -> None:
    """List your sessions, the last used first."""
    with connected(url, api_key) as client:
        options: ListOptions = {"limit": min(limit, 1000), "metadata": _pairs(metadata or [])}
        options["state"] = _state(state)
        found = [
            each for each, _ in zip(client.all_sessions(**options), range(limit), strict=False)
        ]
    print_list(found, _COLUMNS, as_json)


@app.command(context_settings=ANY_ID)
def show(
    session_id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    version: Annotated[int | None, typer.Option(help="Show its messages there.", min=0)] = None,
) -> None:
    """Show a session and its messages."""
    with _session(url, api_key, session_id) as session:
        view, messages = session.get(), session.messages(version)
    if as_json:
        print_json({**view, "messages": messages})
        return
    print_rows(["field", "value"], ([name, shown(view, name)] for name in view))
    print()
    for each in said(messages):
        print_message(each)


@app.command(context_settings=ANY_ID)
def fork(
    session_id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    version: Annotated[int | None, typer.Option(help="Where; else where it is.", min=0)] = None,
) -> None:
    """Open a session with another's past; prints its id."""
    with _session(url, api_key, session_id) as session:
        forked = session.fork(version)
        if as_json:
            print_json(forked.get())
        else:
            print(forked.id)


@app.command(context_settings=ANY_ID)
def rollback(
    session_id: Id,
    version: Annotated[int, typer.Argument(help="The version to go back to.", min=0)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take a session back to one of its versions."""
    with _session(url, api_key, session_id) as session:
        view = session.rollback(version)
    if as_json:
        print_json(view)
    else:
        print(f"{session_id} is at version {view['version']}, {view['tokens']} tokens")


@app.command(context_settings=ANY_ID)
def close(
    session_id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    erase: Annotated[
        bool, typer.Option("--erase", help="Remove its content from the server's files too.")
    ] = False,
) -> None:
    """Close a session."""
    with connected(url, api_key) as client:
        closed = client.request("DELETE", client.session(session_id).path(), query={"erase": erase})
    if as_json:
        print_json(closed)
    else:
        print(f"{session_id} is closed" + (", its content erased" if closed["erased"] else ""))


@app.command(context_settings=ANY_ID)
def tail(
    session_id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Follow what happens to a session, until it ends or you interrupt."""
    try:
        with _session(url, api_key, session_id) as session, session.events() as events:
            for event in events:
                if as_json:
                    print(json.dumps({"event": event.name, **event.data}), flush=True)
                else:
                    fields = " ".join(f"{name}={value}" for name, value in event.data.items())
                    print(f"{datetime.now():%H:%M:%S} {event.name} {fields}", flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command(context_settings=ANY_ID)
def export(
    session_id: Id,
    file: Annotated[Path, typer.Argument(help="Where to; - for standard output.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write a session with all its versions to a file that only you can read."""
    with _session(url, api_key, session_id) as session:
        exported = session.export()
    if str(file) == "-":
        print_json(exported)
        return
    try:
        _write_private(file, json.dumps(exported, ensure_ascii=False))
    except OSError as error:
        raise failed(f"{file} can't be written: {error.strerror}") from error
    print(f"{file}: session {session_id}")


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="What export wrote; - for standard input.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    accept_other_model: Annotated[
        bool,
        typer.Option(
            "--accept-other-model",
            help="Take the messages of a session of another model; its tokens are computed anew.",
        ),
    ] = False,
) -> None:
    """Open a session from a file; prints its id."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        exported = json.loads(text)
    except OSError as error:
        raise failed(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise failed(f"{file} is no exported session: {error}") from error
    if not isinstance(exported, dict):
        raise failed(f"{file} is no exported session: expected a JSON object")
    with connected(url, api_key) as client:
        try:
            session = client.import_session(exported, accept_other_model=accept_other_model)
        except OtherModelError as error:
            raise failed(
                f"{error}\nModel or chat template differ, so this server can't continue the "
                "session's tokens; --accept-other-model takes its messages alone"
            ) from error
        if as_json:
            print_json(session.get())
        else:
            print(session.id)


@contextmanager
def _session(url: str, api_key: str | None, session_id: str) -> Iterator[Session]:
    with connected(url, api_key) as client:
        yield client.session(session_id)


def _state(given: str) -> State:
    for state in ("open", "closed", "expired", "any"):
        if given == state:
            return state
    raise typer.BadParameter(f"{given!r} is none of open, closed, expired, any")


def _pairs(given: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals:
            raise typer.BadParameter(f"{each!r}: expected KEY=VALUE", param_hint="--metadata")
        pairs[key] = value
    return pairs


def _write_private(file: Path, text: str) -> None:
    # Anew, so that a file which others may read already does not get the content.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
