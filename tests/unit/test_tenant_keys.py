"""Keys in their file: made, revoked, read again while a server runs, and told to nobody."""

from __future__ import annotations

import json
import logging
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stateful_sglang.cli import app
from stateful_sglang.tenants import Identity, Keys, KeysError, TenantLimits, keys_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_names_its_tenant_and_what_it_may(path: Path) -> None:
    _, plain = keys_file.add(path, "acme")
    _, admin = keys_file.add(path, "ops", admin=True)
    keys = Keys(path)
    acme, ops = keys.identify(plain), keys.identify(admin)
    assert acme is not None
    assert ops is not None
    assert (acme.tenant, acme.admin, acme.limits) == ("acme", False, TenantLimits())
    assert (ops.tenant, ops.admin) == ("ops", True)
    assert keys.identify(plain[:-1]) is None
    assert keys.identify("") is None


def test_keys_of_one_tenant_share_its_salt_and_no_other_tenant_has_it(path: Path) -> None:
    secrets = [keys_file.add(path, tenant)[1] for tenant in ("acme", "acme", "bolt")]
    keys = Keys(path)
    found = [keys.identify(secret) for secret in secrets]
    salts = [each.salt for each in found if each is not None]
    assert salts[0] == salts[1] != salts[2]


def test_the_same_name_in_another_file_has_another_salt(tmp_path: Path) -> None:
    """So that it can't be made from the name, which others may know."""
    salts = set()
    for name in ("a.json", "b.json"):
        keys_file.add(tmp_path / name, "acme")
        salts.add(keys_file.read(tmp_path / name).tenants["acme"].salt)
    assert len(salts) == 2


def test_the_file_holds_no_key_and_is_for_its_owner_only(path: Path) -> None:
    key, secret = keys_file.add(path, "acme")
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in repr(key)
    path.chmod(0o640)
    with pytest.raises(KeysError, match=r"mode 0640.*chmod 600"):
        Keys(path)


def test_no_secret_is_shown_where_objects_are(path: Path) -> None:
    _, secret = keys_file.add(path, "acme")
    content = keys_file.read(path)
    salt, digest = content.tenants["acme"].salt, content.keys[0].sha256
    keys = Keys(path)
    shown = f"{content} {keys!r} {keys.identify(secret)} {vars(keys)['_path']}"
    assert not [each for each in (salt, digest, secret) if each in shown]


def test_a_revoked_key_stays_listed_and_is_good_no_more(path: Path) -> None:
    key, secret = keys_file.add(path, "acme")
    assert keys_file.revoke(path, key.id).revoked is not None
    keys = Keys(path)
    assert keys.exist
    assert keys.identify(secret) is None
    assert [each.id for each in keys_file.read(path).keys] == [key.id]
    with pytest.raises(KeysError, match="has no key 'x'"):
        keys_file.revoke(path, "x")


def test_a_running_server_takes_changes_of_the_file_the_first_key_included(path: Path) -> None:
    clock = Clock()
    keys = Keys(path, clock)
    assert not keys.exist
    key, secret = keys_file.add(path, "acme")
    clock.now = 1.0
    assert keys.exist
    assert keys.identify(secret) is not None
    keys_file.revoke(path, key.id)
    clock.now = 2.0
    assert keys.identify(secret) is None


def test_the_file_is_looked_at_once_a_second_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys_file.add(path, "acme")
    clock = Clock()
    keys = Keys(path, clock)
    looks: list[Any] = []
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **more: looks.append(self) or real(self, **more))
    for clock.now in (0.1, 0.5, 0.99, 1.0, 1.5):
        keys.identify("x")
    assert len(looks) == 1


@pytest.mark.parametrize("after", ["{", '{"format": 2}', "[]", None])
def test_a_file_that_breaks_later_opens_nothing_and_closes_nobody_out(
    path: Path, after: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = keys_file.add(path, "acme")
    clock = Clock()
    keys = Keys(path, clock)
    if after is None:
        path.unlink()
    else:
        path.write_text(after)
    clock.now = 1.0
    with caplog.at_level(logging.ERROR):
        assert keys.exist
        assert keys.identify(secret) is not None
        assert keys.identify("other") is None
    assert "keys stay as they were" in caplog.text


def test_a_broken_file_that_comes_first_lets_nobody_in(path: Path) -> None:
    clock = Clock()
    keys = Keys(path, clock)
    path.parent.mkdir()
    path.write_text("{")
    path.chmod(0o600)
    clock.now = 1.0
    assert keys.exist
    assert keys.identify("x") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("tenants"),
        lambda document: document["keys"][0].update(tenant="other"),
        lambda document: document["keys"][0].update(sha256="abc"),
        lambda document: document["keys"][0].update(admin="no"),
        lambda document: document["keys"][0].update(more=1),
        lambda document: document["tenants"]["acme"].update(salt=""),
        lambda document: document["tenants"]["acme"].update(limits={"requests": 0}),
        lambda document: document["tenants"]["acme"].update(limits={"request": 1}),
        lambda document: document.update(format=2),
    ],
)
def test_a_file_that_says_something_else_is_refused_without_showing_what(
    path: Path, change: Any
) -> None:
    keys_file.add(path, "acme")
    document = json.loads(path.read_text())
    salt = document["tenants"]["acme"]["salt"]
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(KeysError, match="is no file of keys") as refused:
        Keys(path)
    assert salt not in str(refused.value)
    assert refused.value.__suppress_context__


@pytest.mark.parametrize("name", ["", "-x", "a b", "ä", "a/b", "x" * 65, "a\n"])
def test_a_name_that_would_break_lines_or_paths_is_refused(path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="is no name of a tenant"):
        keys_file.add(path, name)
    assert not path.exists()


def _add_many(path: Path, tenant: str) -> None:
    for _ in range(20):
        keys_file.add(path, tenant)


def test_processes_that_add_at_once_lose_no_key(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    content = keys_file.read(path)
    assert len(content.keys) == 60
    assert len({key.id for key in content.keys}) == 60
    assert sorted(content.tenants) == ["a", "b", "c"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_limits_of_a_tenant_reach_who_has_its_key(path: Path) -> None:
    _, secret = keys_file.add(path, "acme")
    keys_file.limit(path, "acme", {"requests": 3})
    keys_file.limit(path, "acme", {"sessions": 2})
    identity = Keys(path).identify(secret)
    assert identity is not None
    assert identity.limits == TenantLimits(requests=3, sessions=2)
    with pytest.raises(KeysError, match="requests is 0; expected a whole number"):
        keys_file.limit(path, "acme", {"requests": 0})
    with pytest.raises(KeysError, match="has no tenant 'bolt'"):
        keys_file.limit(path, "bolt", {"requests": 1})


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["keys", *words])


def test_the_command_makes_lists_and_revokes(path: Path, tmp_path: Path) -> None:
    named = ["--keys", str(path)]
    added = run("add", "--tenant", "acme", "--admin", *named)
    secret = added.stdout.strip()
    assert isinstance(Keys(path).identify(secret), Identity)
    listed = json.loads(run("list", "--json", *named).stdout)
    (row,) = listed["keys"]
    assert (row["tenant"], row["admin"], row["revoked"]) == ("acme", True, None)
    assert listed["limits"]["acme"]["requests"] == TenantLimits().requests
    assert row["id"] in run("list", *named).stdout
    assert run("revoke", row["id"], *named).exit_code == 0
    assert Keys(path).identify(secret) is None
    assert run("limit", "--tenant", "acme", "--requests", "5", *named).exit_code == 0
    assert secret not in run("list", *named).output


def test_the_command_finds_the_file_in_the_cache_folder(tmp_path: Path) -> None:
    made = run("add", "--tenant", "acme", "--json", "--cache-dir", str(tmp_path))
    assert Keys(tmp_path / "keys.json").identify(json.loads(made.stdout)["key"]) is not None


def test_the_command_says_what_is_wrong_in_a_line(path: Path) -> None:
    refused = run("revoke", "x", "--keys", str(path))
    assert refused.exit_code == 1
    assert "has no key 'x'" in refused.output
    assert "no keys" in run("list", "--keys", str(path)).output.lower()
