"""What a server says while it starts, where the user chose no ``--log-level``.

SGLang then logs its warnings and errors, we our own lines. Left out are warnings that every start
on a machine of its kind repeats, whatever the user does: each is a row here with the reason why it
says nothing. With any ``--log-level`` SGLang's output is left as it is.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from stateful_sglang.runtime.options import Options

LEVEL = "warning"
"""SGLang's log level in such a server."""


class Repeated(NamedTuple):
    """A line that every start repeats."""

    logger: str
    message: str
    """Regular expression that the line begins with."""
    reason: str


LINES = (
    Repeated(
        "sglang.srt.models.registry",
        "Ignore import error when loading ",
        "of other models than the one served; a model that needs the module gets the reason",
    ),
    Repeated(
        "sglang.srt.managers.multimodal_processor",
        "Ignore import error when loading ",
        "of what reads other models' pictures and sounds",
    ),
    Repeated(
        "sglang.srt.arg_groups.attention_hook",
        "Cuda graph is disabled because of using torch native attention backend",
        "there are no CUDA graphs on a CPU",
    ),
    Repeated(
        "sglang.srt.utils.common",
        "Fail to set RLIMIT_NOFILE: ",
        "the limit of the machine stands; thousands of connections need more",
    ),
    Repeated(
        "sglang.kernels.jit.utils.arch",
        "Cannot detect CUDA architecture",
        "there is none on a CPU",
    ),
    Repeated(
        "sglang.srt.distributed.bootstrap",
        "init_cpu_threads_env and shared memory based AllReduce is disabled",
        "one process computes, and reduces nothing with others",
    ),
)

WARNINGS = (
    "Only CUDA, HIP and XPU support AWQ currently",
    "Only CUDA, MUSA and NPU support GGUF quantization currently",
    "Triton is not supported on current platform, roll back to CPU",
    "ORJSONResponse is deprecated",
    "Duplicate Operation ID ",  # SGLang has routes with two methods; told for each at /docs
    "'python -m sglang.launch_server' is still supported",
)
"""Python warnings that tell about formats, devices or commands that nobody asked for."""


class _Repeats(logging.Filter):
    """Drops lines of one logger; those of models come back with the error that may be theirs."""

    def __init__(self, patterns: list[str]) -> None:
        super().__init__()
        self._pattern = re.compile("|".join(patterns))

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        message = record.getMessage()
        if not self._pattern.match(message):
            return True
        _dropped.append(message)
        return False


_dropped: list[str] = []


class _Recall(logging.Filter):
    """Puts what was dropped about models behind an error that calls a model unsupported."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR and _dropped:
            message = record.getMessage()
            if "are not supported" in message:
                models = [line for line in _dropped if line.startswith("Ignore import error")]
                record.msg, record.args = "\n".join([message, *models]), ()
        return True


def wanted(given: Mapping[str, Any]) -> bool:
    """Whether the user left it to us what SGLang logs: gave no level and no configuration."""
    return "log_level" not in given and not os.environ.get("SGLANG_LOGGING_CONFIG_PATH")


def install() -> None:
    """Make this process quiet, if it is one of a server whose user chose no log level."""
    config = Options.from_env()
    if config is None or not config.quiet:
        return
    # SGLang replaces the root logger's handlers in every process; filters of a logger stay.
    for name in {line.logger for line in LINES}:
        patterns = [line.message for line in LINES if line.logger == name]
        logging.getLogger(name).addFilter(_Repeats(patterns))
    logging.getLogger("sglang.srt.managers.scheduler").addFilter(_Recall())
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message))
    logging.getLogger("stateful_sglang").setLevel(logging.INFO)
