"""A start is quiet about what every start repeats, and about nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stateful_sglang.runtime.options import ENV, Options
from stateful_sglang.server import quiet, ready

PRELUDE = """
import logging, warnings
from stateful_sglang.server import quiet
quiet.install()
logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)  # as SGLang does
models = logging.getLogger("sglang.srt.models.registry")
"""


def said(code: str, *, config: Options | None) -> str:
    """What a process of a server with this configuration writes to its standard error."""
    env = {name: value for name, value in os.environ.items() if name != ENV}
    if config is not None:
        before = os.environ.get(ENV)
        config.to_env()
        env[ENV] = os.environ.pop(ENV)
        if before is not None:
            os.environ[ENV] = before
    ran = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


NOISE = """
models.warning("Ignore import error when loading sglang.srt.models.x: No module named 'vllm'")
warnings.warn("Only CUDA, HIP and XPU support AWQ currently.")
"""
QUIET = Options(stateful=True, quiet=True)


def test_what_every_start_repeats_is_left_out() -> None:
    assert said(NOISE, config=QUIET) == ""


@pytest.mark.parametrize("config", [Options(stateful=True), None])
def test_who_chose_a_log_level_sees_all_of_it(config: Options | None) -> None:
    written = said(NOISE, config=config)
    assert "Ignore import error" in written
    assert "AWQ" in written


def test_errors_other_warnings_and_our_own_lines_are_shown() -> None:
    written = said(
        """
        models.error("Ignore import error when loading y: but this is an error")
        models.warning("the checkpoint lacks lm_head.weight")
        warnings.warn("this build of torch is untested")
        logging.getLogger("stateful_sglang.cpu").info("CPU kernels: packed")
        logging.getLogger("sglang.srt").info("not asked for")
        try:
            1 / 0
        except ZeroDivisionError:
            models.exception("Scheduler hit an exception")
        """,
        config=QUIET,
    )
    for expected in (
        "but this is an error",
        "lacks lm_head.weight",
        "torch is untested",
        "CPU kernels: packed",
        "ZeroDivisionError: division by zero",
    ):
        assert expected in written
    assert "not asked for" not in written


def test_what_was_left_out_comes_back_with_the_error_it_may_explain() -> None:
    written = said(
        NOISE
        + """
logging.getLogger("sglang.srt.managers.scheduler").error(
    "Scheduler hit an exception: Model architectures ['X'] are not supported for now."
)
""",
        config=QUIET,
    )
    assert written.index("are not supported") < written.index("No module named 'vllm'")


@pytest.mark.parametrize("line", quiet.LINES, ids=lambda line: line.message)
def test_sglang_still_says_what_is_left_out(line: quiet.Repeated) -> None:
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent.joinpath(*line.logger.split(".")[1:]).with_suffix(".py")
    text = re.sub(r'"\s*\n\s*f?"', "", source.read_text())
    assert line.message in text
    assert "logger = logging.getLogger(__name__)" in text


def test_a_given_level_or_a_logging_configuration_is_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SGLANG_LOGGING_CONFIG_PATH", raising=False)
    assert quiet.wanted({})
    assert not quiet.wanted({"log_level": "info"})
    monkeypatch.setenv("SGLANG_LOGGING_CONFIG_PATH", "logging.json")
    assert not quiet.wanted({})


def told(**changed: bool) -> str:
    facts = {"stateful": True, "key": False, "past_proxy": False, **changed}
    return ready.text("http://127.0.0.1:30000", seconds=19.4, **facts)


def test_the_ready_line_names_the_url_and_a_session_to_try() -> None:
    lines = told().splitlines()
    assert lines[0] == "Ready after 19 s: http://127.0.0.1:30000"
    assert "curl -s http://127.0.0.1:30000/v1/sessions -d" in lines[1]
    assert "/v1/sessions/$session/append" in lines[2]
    assert "\x1b" not in told()


def test_its_command_fits_the_server() -> None:
    assert "sessions" not in told(stateful=False)
    assert "/v1/chat/completions" in told(stateful=False)
    assert "Bearer $API_KEY" in told(key=True)
    assert "--noproxy '*'" in told(past_proxy=True)
    assert "--noproxy" not in told()
