"""A server that would be open, or keep its tenants apart only in part, does not start."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.api.guard import middleware
from stateful_sglang.api.guard.routes import OPEN
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import isolation, own_requests
from stateful_sglang.server.conflicts import VARIABLES_WITH_KEYS, WITH_KEYS
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.tenants import TenantLimits, keys_file

LAUNCH = """
import sys
from stateful_sglang import launch
status = launch.main(sys.argv[1:])
heavy = {"sglang", "torch", "transformers"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else status)
"""

EXCLUDED = {
    "api_key": "s3cret",
    "admin_api_key": "s3cret",
    "grpc_port": 1234,
    "tokenizer_worker_num": 2,
    "disaggregation_mode": "decode",
    "enable_response_store": True,
    "enable_session_radix_cache": True,
    "enable_streaming_session": True,
}


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a file of keys."""
    monkeypatch.setenv("STATEFUL_SGLANG_CACHE", str(tmp_path))
    keys_file.add(tmp_path / "keys.json", "acme")
    return tmp_path / "keys.json"


@pytest.fixture
def keyless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATEFUL_SGLANG_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gpu1", ""])
def test_beyond_this_machine_a_server_needs_keys(keyless: Path, host: str) -> None:
    with pytest.raises(LaunchError, match=r"--host .*keys add --tenant NAME.*--insecure"):
        isolation.check({"host": host}, Options())
    isolation.check({"host": host}, Options(insecure=True))
    isolation.check({"host": host, "api_key": "x"}, Options())
    keys_file.add(keyless / "keys.json", "acme")
    isolation.check({"host": host}, Options())


@pytest.mark.parametrize(
    "given", [{}, {"host": "127.0.0.1"}, {"host": "::1"}, {"host": "localhost"}]
)
def test_on_this_machine_it_needs_none(keyless: Path, given: Mapping[str, str]) -> None:
    isolation.check(given, Options())


def test_it_is_refused_without_an_import_and_with_status_2(keyless: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCH, "--host", "0.0.0.0", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2, ran.stderr
    assert "no keys exist" in ran.stderr


@pytest.mark.parametrize(("name", "value"), EXCLUDED.items())
def test_what_keys_exclude_is_refused_with_the_reason_and_without_a_secret(
    keyed: Path, name: str, value: Any
) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(LaunchError, match=f"{flag} cannot be combined with keys") as refused:
        isolation.check({name: value}, Options(stateful=False))
    assert "s3cret" not in str(refused.value)
    assert str(keyed) in str(refused.value)


def test_every_row_is_tried_here_and_names_what_sglang_takes() -> None:
    from stateful_sglang.cpu.platform import prepare

    prepare()
    import argparse

    from sglang.srt.environ import envs
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert {row.name for row in WITH_KEYS} == EXCLUDED.keys()
    assert EXCLUDED.keys() <= {action.dest for action in parser._actions}
    assert all(hasattr(type(envs), row.name) for row in VARIABLES_WITH_KEYS)


@pytest.mark.parametrize("name", ["SGLANG_GRPC_PORT", "SGLANG_RUST_SERVER"])
def test_variables_that_go_round_keys_are_refused(
    keyed: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(LaunchError, match=f"{name} cannot be combined with keys.*Unset it"):
        isolation.check({}, Options())


def test_without_keys_sglangs_own_stay(keyless: Path) -> None:
    isolation.check({"api_key": "x", "admin_api_key": "y", "grpc_port": 1}, Options())
    args = SimpleNamespace(api_key="x", admin_api_key=None)
    assert isolation.keys(args, Options()) is None


def test_a_file_that_was_named_has_to_be_there_and_good(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    with pytest.raises(LaunchError, match=r"there is no such file; make one with .*keys add"):
        isolation.check({}, Options(keys=path))
    path.write_text("{}")
    path.chmod(0o600)
    with pytest.raises(LaunchError, match="is no file of keys"):
        isolation.check({}, Options(keys=path))
    path.chmod(0o644)
    with pytest.raises(LaunchError, match="chmod 600"):
        isolation.check({}, Options(keys=path))


def test_a_server_can_be_told_to_have_none(keyed: Path) -> None:
    without = Options(keys=Path("off"))
    isolation.check({"grpc_port": 1}, without)
    assert isolation.keys(SimpleNamespace(api_key=None, admin_api_key=None), without) is None
    with pytest.raises(LaunchError, match="no keys exist"):
        isolation.check({"host": "0.0.0.0"}, without)


def test_keys_are_found_in_the_cache_folder_that_was_chosen(tmp_path: Path) -> None:
    options = Options(cache_dir=tmp_path)
    assert not isolation.has_keys(options)
    _, secret = keys_file.add(tmp_path / "keys.json", "acme")
    assert isolation.has_keys(options)
    keys = isolation.keys(SimpleNamespace(api_key=None, admin_api_key=None), options)
    assert keys is not None
    assert keys.identify(secret) is not None


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (Options(allow_host=("http://x",)), "--allow-host"),
        (Options(allow_origin=("x.example",)), "--allow-origin"),
    ],
)
def test_a_name_or_a_page_that_is_none_is_refused_with_its_flag(
    keyless: Path, options: Options, flag: str
) -> None:
    with pytest.raises(LaunchError, match=f"{flag}: .* expected"):
        isolation.check({}, options)


def test_only_what_sglang_asks_of_the_server_itself_carries_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stateful_sglang.cpu.platform import prepare

    prepare()
    import requests
    from sglang.srt.entrypoints import http_server

    sent: list[tuple[str, str, dict[str, Any]]] = []
    monkeypatch.setattr(http_server, "requests", requests)
    monkeypatch.setattr(requests, "request", lambda *to, **more: sent.append((*to, more)))
    own_requests.carry("k", "http://127.0.0.1:1")
    http_server.requests.get("http://127.0.0.1:1/model_info", headers={"a": "b"})
    http_server.requests.post("http://127.0.0.1:12/generate", headers={"a": "b"})
    assert sent == [
        (
            "get",
            "http://127.0.0.1:1/model_info",
            {"headers": {"a": "b", "x-api-key": "k"}},
        ),
        ("post", "http://127.0.0.1:12/generate", {"headers": {"a": "b"}}),
    ]


def test_the_docs_have_each_refusal_limit_and_open_route() -> None:
    page = (Path(__file__).parents[2] / "docs" / "isolation.md").read_text(encoding="utf-8")
    guard = Path(middleware.__file__).read_text(encoding="utf-8")
    for status, kind in re.findall(r"Refusal\(\s*(\d{3}),\s*\"(\w+)\"", guard):
        assert f"| {status} | `{kind}` |" in page
    for field in dataclasses.fields(TenantLimits):
        assert f"| `{field.name}` | {field.default} |" in page
    assert f"| {', '.join(f'`{path}`' for path in OPEN)} | anybody |" in page
