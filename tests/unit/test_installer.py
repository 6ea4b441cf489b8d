"""The installer picks the right torch, does nothing twice, and resumes where it was interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


torch_choice = load("torch_choice")
environment = load("environment")
installer = load("installer")

NEWEST, SECOND, THIRD = torch_choice.torch_builds()[:3]
PLAIN, CPU_BUILD = NEWEST.torch, f"{NEWEST.torch}+cpu"


class Indexes:
    """What pip finds: (requirement, index) to the names it would install."""

    def __init__(self, found: dict[tuple[str, str | None], list[str]]) -> None:
        self.found = found
        self.asked: list[tuple[str, str | None]] = []

    def resolve(self, requirement: str, *, index: str | None, deps: bool) -> list[str] | None:
        self.asked.append((requirement, index))
        return self.found.get((requirement, index))


def test_a_cpu_build_on_the_users_index_is_taken_and_no_other_index_asked() -> None:
    pip = Indexes({(CPU_BUILD, None): ["torch"], (PLAIN, None): ["torch", "nvidia-cublas"]})
    choice = torch_choice.choose_cpu_torch(pip.resolve, None)
    assert choice == (CPU_BUILD, NEWEST.torchvision, None, None)
    assert pip.asked == [(CPU_BUILD, None)]


def test_the_index_given_comes_first() -> None:
    pip = Indexes({(CPU_BUILD, None): ["torch"], (CPU_BUILD, "https://i"): ["torch"]})
    assert torch_choice.choose_cpu_torch(pip.resolve, "https://i").index == "https://i"


def test_pytorchs_own_index_is_asked_before_an_older_or_a_cuda_build_is_taken() -> None:
    own = torch_choice.PYTORCH_CPU_INDEX
    older = f"{SECOND.torch}+cpu"
    pip = Indexes(
        {
            (CPU_BUILD, own): ["torch"],
            (older, None): ["torch"],
            (PLAIN, None): ["torch", "nvidia-cublas"],
        }
    )
    choice = torch_choice.choose_cpu_torch(pip.resolve, None)
    assert choice == (CPU_BUILD, NEWEST.torchvision, own, None)


def test_without_a_cpu_build_of_the_pin_the_newest_other_is_taken_and_said() -> None:
    build = f"{SECOND.torch}+cpu"
    pip = Indexes(
        {
            (PLAIN, None): ["torch", "nvidia-cublas"],
            (build, None): ["torch"],
            (f"{THIRD.torch}+cpu", None): ["torch"],
        }
    )
    choice = torch_choice.choose_cpu_torch(pip.resolve, None)
    assert (choice.requirement, choice.torchvision) == (build, SECOND.torchvision)
    assert PLAIN in choice.note
    assert build in choice.note


def test_where_only_the_cuda_build_is_to_be_had_it_is_taken_and_said() -> None:
    pip = Indexes({(PLAIN, None): ["torch", "nvidia-cublas", "triton"]})
    choice = torch_choice.choose_cpu_torch(pip.resolve, None)
    assert choice.requirement == PLAIN
    assert "only the CUDA build" in choice.note


def test_a_plain_torch_that_needs_no_cuda_is_taken_silently() -> None:
    pip = Indexes({(PLAIN, None): ["torch", "numpy"]})
    choice = torch_choice.choose_cpu_torch(pip.resolve, None)
    assert choice == (PLAIN, NEWEST.torchvision, None, None)


def test_no_torch_at_all_is_an_error() -> None:
    with pytest.raises(torch_choice.InstallError, match="none of torch=="):
        torch_choice.choose_cpu_torch(Indexes({}).resolve, None)


def test_every_torch_that_may_be_installed_is_one_that_sglang_accepts() -> None:
    from packaging.requirements import Requirement

    (line,) = torch_choice.requirements("torch.txt")
    accepted = Requirement(line)
    releases = [build.torch.removeprefix("torch==") for build in torch_choice.torch_builds()]
    assert all(accepted.specifier.contains(release) for release in releases)
    assert releases == sorted(releases, key=lambda r: [*map(int, r.split("."))], reverse=True)
    assert all(
        build.torchvision.startswith("torchvision==") for build in torch_choice.torch_builds()
    )


@pytest.mark.parametrize(
    ("script", "profile"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: x)'", "cuda"),
        ("echo 'No devices were found'", "cpu"),
        ("echo 'GPU access blocked'; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_profile_follows_what_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, profile: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert torch_choice.detect_profile() == profile


@pytest.fixture
def env(tmp_path: Path):
    return installer.Environment(tmp_path)


def make_stages(ran: list[str], *inputs: tuple[str, str], failing: str | None = None) -> list:
    def step(name: str):
        def run() -> None:
            if name == failing:
                raise installer.InstallError("no network")
            ran.append(name)

        return run

    return [installer.Stage(name, given, step(name)) for name, given in inputs]


def quiet(text: str) -> None:
    pass


def test_a_stage_that_is_through_is_not_run_again(env) -> None:
    ran: list[str] = []
    stages = make_stages(ran, ("torch", "1"), ("sglang", "2"))
    installer.run_stages(stages, env, quiet)
    installer.run_stages(stages, installer.Environment(env.folder), quiet)
    assert ran == ["torch", "sglang"]


def test_after_an_interruption_the_rest_is_run(env) -> None:
    ran: list[str] = []
    inputs = (("torch", "1"), ("sglang", "2"), ("ours", "3"))
    with pytest.raises(installer.InstallError):
        installer.run_stages(make_stages(ran, *inputs, failing="sglang"), env, quiet)
    installer.run_stages(make_stages(ran, *inputs), installer.Environment(env.folder), quiet)
    assert ran == ["torch", "sglang", "ours"]


def test_a_change_reruns_its_stage_and_those_after_it(env) -> None:
    ran: list[str] = []
    installer.run_stages(
        make_stages(ran, ("torch", "1"), ("sglang", "2"), ("ours", "3")), env, quiet
    )
    ran.clear()
    installer.run_stages(
        make_stages(ran, ("torch", "1"), ("sglang", "4"), ("ours", "3")), env, quiet
    )
    assert ran == ["sglang", "ours"]


def test_a_stage_whose_package_is_gone_or_another_is_run_again(env) -> None:
    site = env.folder / "lib/python3.11/site-packages"
    ran: list[str] = []
    brings = ("Some_Package==1.2", "other.one>=3", "torch>=2.11,<2.15")
    stage = installer.Stage("packages", "1", lambda: ran.append("packages"), brings)

    def install(*names: str) -> None:
        for old in site.glob("*"):
            old.rmdir()
        for name in names:
            (site / f"{name}.dist-info").mkdir(parents=True)

    sound = ("some_package-1.2", "other_one-4.0", "torch-2.13.0+cpu")
    install(*sound)
    installer.run_stages([stage], env, quiet)
    installer.run_stages([stage], env, quiet)
    assert ran == ["packages"]
    for broken in (
        sound[1:],
        ("some_package-1.3", *sound[1:]),
        (*sound[:1], "other_one-2.9", *sound[2:]),
        (*sound[:2], "torch-2.15.0+cpu"),
        (*sound[:2], "torch-2.9.1+cpu"),
    ):
        ran.clear()
        install(*broken)
        installer.run_stages([stage], env, quiet)
        assert ran == ["packages"]


def test_unreadable_stamps_mean_a_new_start(env) -> None:
    (env.folder / "install-stamps.json").write_text("{")
    assert installer.Environment(env.folder).stamps == {}


def test_packages_that_a_killed_pip_left_half_are_swept(env) -> None:
    site = env.folder / "lib/python3.11/site-packages"
    for name, files in {"whole-1": ["RECORD"], "half-1": ["METADATA"]}.items():
        (site / f"{name}.dist-info").mkdir(parents=True)
        for file in files:
            (site / f"{name}.dist-info" / file).touch()
    assert env.sweep_half_installed() == ["half-1.dist-info"]
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_a_failing_command_shows_its_end_and_names_the_log(env) -> None:
    command = [sys.executable, "-c", "print('noise'); raise SystemExit('no such package')"]
    with pytest.raises(installer.InstallError) as failure:
        env.run(command, quiet)
    assert "no such package" in str(failure.value)
    assert str(env.log) in str(failure.value)
    assert "noise" in env.log.read_text()


def options(*extras: str) -> Namespace:
    return Namespace(torch_index_url=None, with_=list(extras))


def names(env, profile: str) -> list[str]:
    return [stage.name for stage in installer.stages(env, options(), profile, quiet)]


def test_the_cuda_profile_is_sglangs_ordinary_install(env, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(env, "pip", lambda *args, progress: asked.append(tuple(map(str, args))))
    for stage in installer.stages(env, options("test"), "cuda", quiet):
        stage.run()
    assert asked[0] == (f"sglang=={installer.SGLANG_VERSION}",)
    assert asked[-1] == ("-e", f"{installer.ROOT}[test]")
    assert "torch for the CPU" not in names(env, "cuda")


def test_the_cpu_profile_lets_no_requirement_replace_torch(
    env, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(env, "pip", lambda *args, progress: asked.append(" ".join(map(str, args))))
    monkeypatch.setattr(env, "resolve", lambda requirement, index, deps: ["torch"])
    for stage in installer.stages(env, options(), "cpu", quiet):
        stage.run()
    assert asked[:2] == [CPU_BUILD, f"--no-deps {NEWEST.torchvision}"]
    (engine,) = [line for line in asked if "sglang==" in line]
    assert engine.startswith("--no-deps ")
    (rest,) = [line for line in asked if "cpu.txt" in line]
    assert "-c " in rest
    assert "torch.txt" in rest


def test_without_a_suitable_python_the_script_says_which_is_needed(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(
        ["/bin/bash", SCRIPTS / "install"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no Python 3.11 or 3.12 was found" in done.stderr


def test_a_place_that_cannot_be_written_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    done = subprocess.run(
        [sys.executable, SCRIPTS / "installer.py", "--profile", "cpu", "--venv", blocked],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(blocked) in done.stderr


def test_stamps_are_readable_by_a_person(env) -> None:
    installer.run_stages(make_stages([], ("torch", "1")), env, quiet)
    assert list(json.loads((env.folder / "install-stamps.json").read_text())) == ["torch"]
