"""Who may use a server, settled at its start: its keys, its names, the pages that may ask it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateful_sglang.api.guard.sites import Sites
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import address, conflicts
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.tenants import Keys, KeysError, keys_file

OFF = Path("off")
"""In the place of a file: no keys, whatever file there is."""


def path_of(options: Options) -> Path | None:
    """Where the server's file of keys is, or would be; None where it is to have none."""
    if options.keys == OFF:
        return None
    return options.keys or keys_file.default_path(options.cache_dir)


def has_keys(options: Options) -> bool:
    """Whether callers need a key from the start."""
    path = path_of(options)
    return path is not None and (options.keys is not None or path.exists())


def check(given: Mapping[str, Any], options: Options) -> None:
    """Refuse what would leave the server open, or keep its tenants apart only in part.

    Raises:
        LaunchError: Says what, why, and the remedy.
    """
    keyed, path = has_keys(options), path_of(options)
    if keyed and path is not None:
        _read(path)
        conflicts.check_keys(given, os.environ, path)
    if not options.insecure:
        address.require_keys(given, keyed=keyed)
    sites(given.get("host", address.DEFAULT_HOST), options)


def sites(host: str, options: Options) -> Sites:
    """The names of a server that listens on `host`, and the pages that may use it.

    Raises:
        LaunchError: A name or an origin is none.
    """
    for flag, hosts, origins in (
        ("--allow-host", options.allow_host, ()),
        ("--allow-origin", (), options.allow_origin),
    ):
        try:
            Sites(host, hosts, origins)
        except ValueError as error:
            raise LaunchError(f"{flag}: {error}") from error
    return Sites(host, options.allow_host, options.allow_origin)


def keys(server_args: Any, options: Options) -> Keys | None:
    """The keys that the server looks at; None where it has none, or SGLang's own are asked for.

    The file may come while the server runs: from then on a key is needed.

    Raises:
        LaunchError: The file can't be used.
    """
    path = path_of(options)
    if path is None or server_args.api_key or server_args.admin_api_key:
        return None
    try:
        return Keys(path)
    except KeysError as error:
        raise LaunchError(str(error)) from error


def _read(path: Path) -> None:
    try:
        keys_file.read(path)
    except FileNotFoundError as error:
        raise LaunchError(
            f"--keys {path}: there is no such file; make one with stateful-sglang keys add "
            f"--tenant NAME --keys {path}"
        ) from error
    except KeysError as error:
        raise LaunchError(str(error)) from error
