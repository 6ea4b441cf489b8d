"""The virtual environment that is set up: its commands, its log, and what is done already.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch_choice import PYTORCH_CPU_INDEX, InstallError

ROOT = Path(__file__).resolve().parent.parent


class Environment:
    """The virtual environment that is set up, its log and its stamps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "install.log"
        self._stamps_file = folder / "install-stamps.json"
        self.stamps: dict[str, str] = {}
        if self._stamps_file.is_file():
            try:
                self.stamps = json.loads(self._stamps_file.read_text())
            except ValueError:
                self.stamps = {}

    def stamp(self, name: str, digest: str | None) -> None:
        """Record that a stage is through, or (None) that it is not."""
        self.stamps.pop(name, None)
        if digest is not None:
            self.stamps[name] = digest
        part = self._stamps_file.with_suffix(".part")
        part.write_text(json.dumps(self.stamps, indent=2))
        part.replace(self._stamps_file)

    def run(self, command: Sequence[str | Path], progress: Callable[[str], None]) -> None:
        """Run `command`, its output into the log; the end of it is shown when it fails."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        tail: list[str] = []
        with self.log.open("a") as log:
            print(f"$ {' '.join(map(str, command))}", file=log, flush=True)
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                env=env,
                cwd=ROOT,
            ) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    log.write(line)
                    tail = [*tail[-24:], line.rstrip()]
                    progress(line.strip())
        if child.returncode:
            raise InstallError(
                "\n".join(tail)
                + f"\n(status {child.returncode}; the whole output is in {self.log})"
            )

    def pip(self, *arguments: str | Path, progress: Callable[[str], None]) -> None:
        """Run `pip install` in the environment."""
        self.run([self.python, "-m", "pip", "install", "--no-input", *arguments], progress)

    def resolve(
        self, requirement: str, *, index: str | None = None, deps: bool
    ) -> list[str] | None:
        """Names of the packages that pip would install for `requirement`, None if it finds none."""
        command = [self.python, "-m", "pip", "install", "--dry-run", "--quiet", "--no-input"]
        command += ["--ignore-installed", "--only-binary=:all:", "--report", "-"]
        if index:
            command += ["--extra-index-url", index]
        if index == PYTORCH_CPU_INDEX:
            command += ["--timeout", "5", "--retries", "0"]
        if not deps:
            command.append("--no-deps")
        done = subprocess.run([*command, requirement], capture_output=True, text=True, cwd=ROOT)
        with self.log.open("a") as log:
            print(f"$ {' '.join(map(str, command))} {requirement}\n{done.stderr}", file=log)
        if done.returncode:
            return None
        report: dict[str, Any] = json.loads(done.stdout)
        return [item["metadata"]["name"].lower() for item in report["install"]]

    def has(self, requirements: Iterable[str]) -> bool:
        """Whether these packages are installed, in a version that each requirement allows."""
        installed = {}
        for info in self.folder.glob("lib/python*/site-packages/*.dist-info"):
            name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
            installed[_normalised(name)] = version
        for requirement in requirements:
            name = re.split("[<>=!~;[]", requirement)[0].strip()
            version = installed.get(_normalised(name))
            if version is None or not _allows(requirement, version):
                return False
        return True

    def sweep_half_installed(self) -> list[str]:
        """Remove what a killed pip left behind: metadata without the record written last."""
        swept = []
        for info in self.folder.glob("lib/python*/site-packages/*.dist-info"):
            if not (info / "RECORD").is_file():
                shutil.rmtree(info)
                swept.append(info.name)
        return swept


def _normalised(name: str) -> str:
    """A package's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _allows(requirement: str, version: str) -> bool:
    """Whether a version lies in a requirement's bounds, local parts (`+cpu`) left out."""
    compare = {"==": operator.eq, ">=": operator.ge, "<": operator.lt}
    found = _release(version)
    bounds = re.findall(r"(==|>=|<)\s*([^,;\s]+)", requirement.split(";")[0])
    return all(compare[sign](found, _release(bound)) for sign, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    """A version's numbers, trailing zeros left out: `0.2.10+cpu` as (0, 2, 10)."""
    numbers = [int(digits) for digits in re.findall(r"\d+", version.split("+")[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
