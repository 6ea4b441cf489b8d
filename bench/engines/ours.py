"""Our own launcher as an arm: of this tree, of another one, or with a part exchanged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench.engines.arms import CONTEXT, POOL_TOKENS, REQUESTS, Command, Setting, words
from bench.harness.server import apart

LAUNCHER = "stateful_sglang.launch"
BIASED = "bench.engines.biased"
"""The launcher with a verifier that is wrong on purpose."""


def launched(*arguments: str, module: str = LAUNCHER) -> Callable[[Setting], Command]:
    """The launcher of this tree as users start it, with its own settings but for `arguments`."""

    def command(setting: Setting) -> Command:
        return Command((sys.executable, "-m", module, *arguments, *apart(arguments)))

    return command


def alone(*more: str) -> Callable[[Setting], Command]:
    """This tree's engine without sessions, in the setting that all engines are compared in."""

    def command(setting: Setting) -> Command:
        start = (sys.executable, "-m", LAUNCHER, "--stateful", "off", "--keys", "off")
        return Command((*start, *_model(setting), *_pool(), *more), env=_threads(setting))

    return command


def of_tree(folder: Path, python: Path, *more: str) -> Callable[[Setting], Command]:
    """The engine of another source tree, run by its own environment; nothing of it is imported."""

    def command(setting: Setting) -> Command:
        start = (str(python), "-m", LAUNCHER, "--stateful", "off")
        return Command(
            (*start, *_model(setting), *_pool(), *more),
            env={**_threads(setting), "PYTHONPATH": str(folder)},
            folder=folder,
        )

    return command


def interpreter(python: Path) -> Path:
    """An absolute path that is not resolved: a virtual environment's python is a link."""
    return Path(os.path.abspath(python.expanduser()))


def _model(setting: Setting) -> tuple[str, ...]:
    return ("--model-path", str(setting.model))


def _pool() -> tuple[str, ...]:
    return words(
        {
            "--context-length": str(CONTEXT),
            "--max-total-tokens": str(POOL_TOKENS),
            "--max-running-requests": str(REQUESTS),
        }
    )


def _threads(setting: Setting) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(setting.threads)}
