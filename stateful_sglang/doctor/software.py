"""Checks of what is installed. SGLang is never imported: it takes seconds and may be broken."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from stateful_sglang import SGLANG_VERSION, __version__
from stateful_sglang.doctor.finding import INSTALL, REQUIREMENTS, Finding, version_of
from stateful_sglang.runtime import options
from stateful_sglang.runtime.declarations import OptionError

SHOWN_PACKAGES = ("transformers", "torchvision", "xgrammar", "numpy")


def ourselves() -> Finding:
    plugins = metadata.entry_points(group="sglang.srt.plugins")
    if "stateful_sglang" not in plugins.names:
        return Finding(
            "stateful_sglang", "fail", f"{__version__}, unknown to SGLang as a plugin", INSTALL
        )
    return Finding("stateful_sglang", "ok", f"{__version__}, {Path(__file__).parent.parent}")


def python() -> Finding:
    found = f"{platform.python_version()}, {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("python", "fail", found, "Python 3.11 or 3.12 is needed")
    return Finding("python", "ok", found)


def torch() -> Finding:
    from packaging.requirements import Requirement

    (line,) = _lines("torch.txt")
    accepted = Requirement(line).specifier
    pinned, *_ = _lines("torch-builds.txt")[0].removeprefix("torch==").split()
    try:
        import torch
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0]
        return Finding("torch", "fail", f"cannot be imported: {first}", INSTALL)
    found = str(torch.__version__)
    release = found.split("+")[0]
    if not accepted.contains(release, prereleases=True):
        return Finding("torch", "fail", f"{found}, SGLang needs {accepted}", INSTALL)
    threads = f"{torch.get_num_threads()} threads"
    if release == pinned:
        return Finding("torch", "ok", f"{found}, {threads}")
    return Finding("torch", "ok", f"{found} (SGLang accepts {accepted}), {threads}")


def sglang() -> Finding:
    found = version_of("sglang")
    if found is None:
        return Finding("sglang", "fail", f"missing, expected {SGLANG_VERSION}", INSTALL)
    if found != SGLANG_VERSION:
        return Finding(
            "sglang",
            "fail",
            f"{found}; this version of stateful_sglang is bound to exactly {SGLANG_VERSION}",
            f"{INSTALL}, or: pip install --no-deps sglang=={SGLANG_VERSION}",
        )
    return Finding("sglang", "ok", f"{found}, the pinned version")


def settings() -> Finding:
    """Our variables in the environment that a server would inherit."""
    known = {name.removeprefix(options.PREFIX): name for name in options.VARIABLES}
    try:
        left_over = options.Options.from_env() is not None
    except OptionError as error:
        return Finding("settings", "fail", str(error), f"unset {options.ENV}")
    if left_over:
        return Finding(
            "settings",
            "note",
            f"{options.ENV} is set: SGLang's own servers would be started with sessions too",
            f"unset {options.ENV}",
        )
    ours = sorted(name for name in os.environ if name.startswith(options.PREFIX))
    for name in ours:
        if name not in options.VARIABLES:
            meant = difflib.get_close_matches(name.removeprefix(options.PREFIX), known, 1, 0.7)
            if meant:
                return Finding(
                    "settings",
                    "note",
                    f"nothing reads {name}",
                    f"did you mean {known[meant[0]]}?",
                )
    given = [f"{name}={os.environ[name]}" for name in ours if name in options.VARIABLES]
    return Finding("settings", "ok", ", ".join(given) or "no variable of ours is set")


def packages() -> Finding:
    from packaging.requirements import Requirement

    wrong = []
    for line in (*_lines("cpu.txt"), *_lines("cpu-no-deps.txt"), *_torchvision()):
        wanted = Requirement(line)
        version = version_of(wanted.name)
        if version is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, not {wanted.specifier}")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), INSTALL)
    shown = ", ".join(f"{name} {version_of(name)}" for name in SHOWN_PACKAGES)
    return Finding("packages", "ok", shown)


def _torchvision() -> list[str]:
    """The torchvision that goes with the installed torch: its operators are bound to one minor."""
    minor = (version_of("torch") or "").split("+")[0].split(".")[:2]
    for line in _lines("torch-builds.txt"):
        torch, torchvision = line.split()
        if torch.removeprefix("torch==").split(".")[:2] == minor:
            return [torchvision.rpartition(".")[0] + ".*"]
    return ["torchvision"]


def _lines(file: str) -> list[str]:
    lines = (REQUIREMENTS / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def attachments() -> Finding:
    if version_of("sglang") is None:
        return Finding("attachments", "fail", "not checked: SGLang is missing", INSTALL)
    from stateful_sglang.attachments import check as attachments

    rows = attachments.check()
    changed = [row for row in rows if not row.holds]
    if changed:
        names = ", ".join(
            row.attachment.target + ("" if row.found else " (gone)") for row in changed
        )
        return Finding(
            "attachments",
            "fail",
            f"{len(changed)} of {len(rows)} differ from the source they were tested with: {names}",
            f"reinstall SGLang unchanged: pip install --no-deps --force-reinstall "
            f"sglang=={SGLANG_VERSION}",
        )
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row.attachment.kind] = kinds.get(row.attachment.kind, 0) + 1
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return Finding("attachments", "ok", f"{len(rows)} to SGLang, every fingerprint holds ({shown})")
