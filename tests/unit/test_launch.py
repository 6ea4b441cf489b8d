"""Start-up errors: one clear message and exit status 2, never a traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stateful_sglang import launch
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.runtime.options import Options
from stateful_sglang.server import address, arguments, conflicts, model, preflight, suit
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.server.parser import parse


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model's folder with nothing but a configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("budget", ["-0.1", "1.5", "nan"])
def test_a_pin_budget_out_of_range_names_the_range(budget: str) -> None:
    with pytest.raises(LaunchError, match="between 0 and 1"):
        parse(["--pin-budget", budget])


def test_no_drafts_at_all_is_another_flag() -> None:
    with pytest.raises(LaunchError, match="--draft off"):
        parse(["--max-draft", "0"])


def test_another_quantisation_names_the_known_ones() -> None:
    with pytest.raises(LaunchError, match="int8"):
        parse(["--cpu-quant", "int4"])


def test_content_is_text_unless_told_otherwise() -> None:
    assert parse([])[0].content_tokens == Options().content_tokens == "text"
    assert parse(["--content-tokens", "special"])[0].content_tokens == "special"
    with pytest.raises(LaunchError, match="--content-tokens"):
        parse(["--content-tokens", "yes"])


def test_int8_without_kernels_says_why_there_are_none(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATEFUL_SGLANG_CPU_ISA", "off")
    (model_dir / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(LaunchError, match=r"needs the compiled kernels.*STATEFUL_SGLANG_CPU_ISA"):
        suit.for_cpu({"model_path": str(model_dir)}, {}, int8=True)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(LaunchError, match="--pin-budget"):
        parse(["--pin-budget", "half"])


def test_other_arguments_are_sglangs_in_their_order() -> None:
    ours, theirs = parse(["--port", "1", "--stateful", "off", "--tp", "2", "--log-level=x"])
    assert ours.stateful is False
    assert theirs == ["--port", "1", "--tp", "2", "--log-level=x"]


def test_another_sglang_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.5.9")
    with pytest.raises(LaunchError, match=r"SGLang 0\.5\.9 is installed.*exactly 0\.5\.23"):
        preflight.require_sglang()


def test_the_launcher_exits_with_status_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--pin-budget", "2"]) == launch.EXIT_UNUSABLE
    assert capsys.readouterr().err.startswith("stateful_sglang: --pin-budget is 2.0")


def test_started_as_a_module_it_prints_no_traceback() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "stateful_sglang.launch", "--frobnicate"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == launch.EXIT_UNUSABLE, ran.stderr
    assert "stateful_sglang: unrecognized arguments: --frobnicate" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            address.check({"port": port})


def test_a_free_port_is_bound_to_this_machine_only_unless_told_otherwise() -> None:
    address.check({"port": 0})
    assert address.default({"port": 0}) == {"host": "127.0.0.1"}
    address.check({"port": 0, "host": "0.0.0.0"})
    assert address.default({"port": 0, "host": "0.0.0.0"}) == {}


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"127\.0\.0\.1:70000"):
        address.check({"port": 70000})


@pytest.mark.parametrize("given", [{"disable_radix_cache": True}, {"radix_cache_backend": "other"}])
def test_what_contradicts_sessions_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(LaunchError, match="--stateful off"):
        conflicts.check(given, Options(stateful=True))
    conflicts.check(given, Options(stateful=False))


def test_the_other_encoding_between_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_PICKLE_IPC", "0")
    with pytest.raises(LaunchError, match="SGLANG_USE_PICKLE_IPC=0 cannot be combined"):
        conflicts.check({}, Options(stateful=True))
    conflicts.check({}, Options(stateful=False))


def test_what_only_repeats_a_default_is_no_contradiction() -> None:
    given = {"tokenizer_worker_num": 1, "dp_size": 1, "disable_radix_cache": False}
    conflicts.check(given, Options(stateful=True))


def test_another_kind_of_server_is_refused() -> None:
    with pytest.raises(LaunchError, match="--use-ray"):
        conflicts.check({"use_ray": True}, Options())


def test_a_model_path_that_does_not_exist_is_named() -> None:
    with pytest.raises(LaunchError, match="--model-path /nowhere/model does not exist"):
        model.check("/nowhere/model", "auto")


@pytest.mark.parametrize("path", ["org/model", "s3://bucket/model"])
def test_a_model_that_is_not_local_is_left_to_sglang(path: str) -> None:
    model.check(path, "auto")


def test_a_model_without_weights_is_refused_unless_they_are_to_be_made_up(model_dir: Path) -> None:
    with pytest.raises(LaunchError, match="holds no weights"):
        model.check(str(model_dir), "auto")
    model.check(str(model_dir), "dummy")
    (model_dir / "model.safetensors").write_bytes(b"x")
    model.check(str(model_dir), "auto")


def test_a_model_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no .*config\.json"):
        model.configuration(str(tmp_path))


def test_too_little_memory_says_how_much_is_needed(model_dir: Path) -> None:
    with pytest.raises(LaunchError, match=r"too little memory.*GiB are free"):
        suit.for_cpu({"model_path": str(model_dir), "max_total_tokens": 10**12}, {})


def test_cpu_settings_leave_alone_what_was_given(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "0")
    added: dict[str, suit.Setting] = {}
    report = suit.for_cpu({"model_path": str(model_dir), "context_length": 2000}, added)
    assert "context_length" not in added
    assert added["attention_backend"] == "torch_native"
    assert added["disable_overlap_schedule"] is True
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "2000" in report


@pytest.mark.parametrize(
    ("dumps", "wanted", "folder", "waits"),
    [
        (None, None, None, False),
        ("0", None, None, False),
        ("1", None, None, True),
        (None, None, "/dumps", True),
        (None, "1", None, True),
    ],
)
def test_a_crashed_server_waits_only_for_a_core_dump_that_can_be_written(
    dumps: str | None,
    wanted: str | None,
    folder: str | None,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.environ import envs

    asked = {
        "CUDA_ENABLE_USER_TRIGGERED_COREDUMP": dumps,
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": wanted,
    }
    for name, value in asked.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    suit.for_crashes({"crash_dump_folder": folder})
    assert envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get() is waits


def test_sessions_bring_their_tree_and_their_drafts() -> None:
    added: dict[str, suit.Setting] = {}
    suit.for_sessions(Options(stateful=True, max_draft=6), {}, added)
    assert added["radix_cache_backend"] == "cardinal"
    assert added["speculative_algorithm"] == "PROMPT_LOOKUP"
    assert added["speculative_num_draft_tokens"] == 7


def test_figures_are_served_unless_the_user_says_otherwise() -> None:
    on: dict[str, suit.Setting] = {}
    suit.for_sessions(Options(), {}, on)
    assert on["enable_metrics"] is True
    for options, given in ((Options(metrics=False), {}), (Options(), {"enable_metrics": True})):
        added: dict[str, suit.Setting] = {}
        suit.for_sessions(options, given, added)
        assert "enable_metrics" not in added


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (Options(stateful=True, draft="off"), {}),
        (Options(stateful=True), {"speculative_algorithm": "EAGLE"}),
    ],
)
def test_no_lookup_drafts_where_they_are_off_or_another_drafter_was_asked_for(
    config: Options, given: dict[str, object]
) -> None:
    added: dict[str, suit.Setting] = {}
    suit.for_sessions(config, given, added)
    assert "speculative_algorithm" not in added


def test_a_config_file_counts_as_given(tmp_path: Path) -> None:
    prepare()
    file = tmp_path / "server.yaml"
    file.write_text("context-length: 512\ndisable-radix-cache: true\n")
    given, argv = arguments.given_arguments(["--config", str(file), "--port", "31000"])
    assert (given["context_length"], given["port"]) == (512, 31000)
    assert "model_path" not in given
    assert "--config" not in argv


def test_an_unknown_argument_is_named() -> None:
    prepare()
    with pytest.raises(LaunchError, match="--frobnicate"):
        arguments.given_arguments(["--frobnicate"])
