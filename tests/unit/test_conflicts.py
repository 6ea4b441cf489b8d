"""What excludes sessions is refused at start, however it was written, and with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from stateful_sglang.cpu.platform import prepare
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import arguments, conflicts
from stateful_sglang.server.errors import LaunchError

SESSIONS = Options(stateful=True, draft="off")
REVIEWED = Path(__file__).with_name("reviewed_arguments.txt")
NOT_YET = {"attn_dp_size"}
"""Arguments of a later SGLang than the one that is installed."""

WRITTEN = [
    ["--incremental-streaming-output"],
    ["--incremental-str"],
    ["--pp-size", "2"],
    ["--pipeline-parallel-size=2"],
    ["--disaggregation-mode", "decode"],
    ["--disaggregation-mo", "prefill"],
    ["--data-parallel-size", "2"],
    ["--tokenizer-worker-num", "2"],
    ["--grpc-port", "30001"],
    ["--enable-hierarchical-cache"],
    ["--enable-session-radix-cache"],
    ["--enable-streaming-session"],
    ["--strip-thinking-cache"],
    ["--skip-tokenizer-init"],
    ["--is-embedding"],
    ["--decoupled-spec-role", "verifier"],
    ["--preferred-sampling-params", '{"n": 2}'],
]


@pytest.fixture(scope="module", autouse=True)
def _sglang_imports() -> None:
    prepare()


@pytest.mark.parametrize("written", WRITTEN, ids=" ".join)
def test_an_argument_that_excludes_sessions_is_refused(written: list[str]) -> None:
    given, _ = arguments.given_arguments(written)
    with pytest.raises(LaunchError, match=r"cannot be combined with sessions: .*--stateful off"):
        conflicts.check(given, SESSIONS)
    conflicts.check(given, Options(stateful=False))


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]])
def test_it_is_refused_in_a_configuration_file_too(tmp_path: Path, spelling: list[str]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("pipeline-parallel-size: 2\n")
    given, _ = arguments.given_arguments([word.format(file) for word in spelling])
    with pytest.raises(LaunchError, match="--pp-size 2 cannot"):
        conflicts.check(given, SESSIONS)


def test_a_shortened_config_is_refused_since_sglang_would_not_read_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\n")
    with pytest.raises(LaunchError, match="Write --config FILE"):
        arguments.given_arguments(["--confi", str(file)])


@pytest.mark.parametrize(
    "written",
    [
        ["--pp-size", "1"],
        ["--disaggregation-mode", "null"],
        ["--preferred-sampling-params", '{"temperature": 0.5}'],
        ["--tp-size", "2", "--nnodes", "2", "--page-size", "16", "--stream-interval", "4"],
        ["--log-level", "info", "--enable-metrics", "--enable-custom-logit-processor"],
    ],
    ids=" ".join,
)
def test_everything_else_is_sglangs_business(written: list[str]) -> None:
    given, _ = arguments.given_arguments(written)
    conflicts.check(given, SESSIONS)


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("SGLANG_USE_PICKLE_IPC", "false", "true"),
        ("SGLANG_RUST_SERVER", "1", "0"),
        ("SGLANG_GRPC_PORT", "30001", ""),
        ("SGLANG_TEST_SCRIPTED_RUNTIME", "true", "0"),
    ],
)
def test_a_variable_that_excludes_sessions_is_refused(
    name: str, refused: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, taken)
    conflicts.check({}, SESSIONS)
    monkeypatch.setenv(name, refused)
    with pytest.raises(LaunchError, match=f"{name}={refused} cannot be combined"):
        conflicts.check({}, SESSIONS)
    conflicts.check({}, Options(stateful=False))


@pytest.mark.parametrize("stateful", [True, False])
def test_a_list_of_plugins_without_ours_is_refused(
    stateful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another, stateful_sglang")
    conflicts.check({}, Options(stateful=stateful))
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    with pytest.raises(LaunchError, match="leaves out our plugin"):
        conflicts.check({}, Options(stateful=stateful))


def _known() -> dict[str, set[str]]:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {action.dest: set(action.option_strings) for action in parser._actions}


def test_every_row_names_an_argument_as_users_write_it() -> None:
    known = _known()
    rows = {row.name for row in conflicts.ARGUMENTS + conflicts.OTHER_SERVERS} - NOT_YET
    assert rows <= known.keys()
    for name in rows:
        assert "--" + name.replace("_", "-") in known[name]


def test_every_argument_of_sglang_was_looked_at() -> None:
    reviewed = set(REVIEWED.read_text().split("\n"))
    new = _known().keys() - reviewed - {"help"}
    assert not new, "decide whether sessions exclude them, then list them as reviewed"


def test_every_variable_is_one_that_sglang_reads() -> None:
    from sglang.srt.environ import envs

    assert all(hasattr(type(envs), row.name) for row in conflicts.VARIABLES)
