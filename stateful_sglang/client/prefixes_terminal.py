"""``stateful-sglang prefixes``: what all tenants of a server share, for its administrators."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stateful_sglang.client.connecting import ANY_ID, ApiKey, AsJson, Url, connected, failed
from stateful_sglang.client.printing import print_json, print_list
from stateful_sglang.client.sync import DEFAULT_URL
from stateful_sglang.client.types import PublishOptions, prefix_path

app = typer.Typer(
    name="stateful-sglang prefixes",
    help="System prompts that all tenants of a running server share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COLUMNS = {
    "id": "id",
    "name": "name",
    "state": "state",
    "tokens": "tokens",
    "shared": "aligned_tokens",
    "published": "created_at",
    "problem": "problem",
}
"""Of a list, by the field that each shows."""


@app.command()
def add(
    file: Annotated[
        Path,
        typer.Argument(help="The system prompt, exactly as sessions have it; - for standard input"),
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The tools behind it: a JSON list in OpenAI's form."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Text outside any chat template, as prompts begin.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="What ls calls it.", show_default="the file's", metavar="TEXT"),
    ] = None,
) -> None:
    """Publish a system prompt: every tenant's conversations that begin with it share its KV."""
    if raw and tools is not None:
        raise typer.BadParameter("there are no tools in raw text", param_hint="--tools")
    text = _text(file)
    asked: PublishOptions = {"text": text} if raw else {"system": text}
    asked["name"] = name or (None if str(file) == "-" else file.name[:256])
    if tools is not None:
        asked["tools"] = _tools(tools)
    with connected(url, api_key) as client:
        published = client.publish(**asked)
    if text.endswith("\n"):
        print(
            "stateful-sglang: it ends with a line break, which is part of it: what lacks that "
            "shares nothing",
            file=sys.stderr,
        )
    if as_json:
        print_json(published)
    else:
        print(published["id"])


@app.command()
def ls(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List what is published, the oldest first."""
    with connected(url, api_key) as client:
        found = client.prefixes()
    print_list(found, _COLUMNS, as_json)


@app.command(context_settings=ANY_ID)
def rm(
    prefix_id: Annotated[
        str, typer.Argument(metavar="ID", help="A prefix's id, as ls shows it.", show_default=False)
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Publish a prefix no longer."""
    with connected(url, api_key) as client:
        removed = client.request("DELETE", prefix_path(prefix_id))
    if as_json:
        print_json(removed)
    else:
        print(f"{prefix_id} is published no longer")


def _text(file: Path) -> str:
    """What a file holds, line breaks as they are."""
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode()
    except OSError as error:
        raise failed(f"{file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise failed(f"{file} is no text in UTF-8: {error}") from error


def _tools(file: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(_text(file))
    except ValueError as error:
        raise failed(f"{file} is no JSON: {error}") from error
    if not isinstance(tools, list):
        raise failed(f"{file} holds no list of tools: expected a JSON array")
    return tools
