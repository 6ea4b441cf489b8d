"""What a process looks like after `prepare`, each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="this machine has an accelerator"
)


def run(code: str, *, path: Path | None = None) -> str:
    """Run Python code in a fresh interpreter and return what it prints."""
    # Tests before this one may have prepared their own process, which writes its environment.
    env = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    prelude = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    ran = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def fake_package(folder: Path, name: str, **files: str) -> Path:
    package = folder / name
    package.mkdir()
    for file, text in ({"__init__": ""} | files).items():
        (package / f"{file}.py").write_text(text)
    return folder


def test_sglang_finds_a_cpu_engine_with_our_ops() -> None:
    printed = run(
        """
        from stateful_sglang.cpu.platform import prepare
        assert prepare() is prepare()
        from sglang.srt.utils import is_cpu
        import sglang.kernels.ops.speculative.reconstruct_tree as reconstruct_tree
        import sglang.kernels.ops.speculative.spec_tree as spec_tree
        from stateful_sglang.cpu.standin import tree_ops
        assert spec_tree.sgl_verify_tree_greedy_cpu is tree_ops.verify_tree_greedy_cpu
        assert reconstruct_tree.reconstruct_indices_from_tree_mask is (
            tree_ops.reconstruct_indices_from_tree_mask
        )
        print(is_cpu())
        """
    )
    assert printed == "True"


def test_torchvision_imports_whichever_build_of_it_is_there() -> None:
    run("from stateful_sglang.cpu.platform import prepare; prepare(); import torchvision")


def test_a_real_sgl_kernel_is_never_shadowed(tmp_path: Path) -> None:
    folder = fake_package(tmp_path, "sgl_kernel", __init__="REAL = True\n")
    printed = run(
        """
        from stateful_sglang.cpu.platform import has_real_sgl_kernel, prepare
        print(prepare().standin_kernel, has_real_sgl_kernel())
        import sgl_kernel
        assert sgl_kernel.REAL
        """,
        path=folder,
    )
    assert printed == "False True"


def test_nothing_is_done_where_there_is_an_accelerator() -> None:
    printed = run(
        """
        import os, sys, torch
        torch.accelerator.is_available = lambda: True
        from stateful_sglang.cpu.platform import prepare
        done = prepare()
        print(done.cpu_engine, done.standin_kernel, "sgl_kernel" in sys.modules,
              "SGLANG_USE_CPU_ENGINE" in os.environ)
        """
    )
    assert printed == "False False False False"


@pytest.mark.parametrize("module", ["scalar_type", "quantization"])
def test_what_sglang_has_a_fallback_for_is_absent(module: str) -> None:
    run(
        f"""
        from stateful_sglang.cpu.platform import prepare
        prepare()
        try:
            import sgl_kernel.{module}
        except ImportError:
            raise SystemExit
        raise SystemExit("sgl_kernel.{module} was found")
        """
    )


def test_a_kernel_that_the_stand_in_lacks_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        from stateful_sglang.cpu.standin.sgl_kernel import (  # noqa: F401
            tree_speculative_sampling_target_only,
        )


def test_too_late_a_call_says_what_to_do() -> None:
    printed = run(
        """
        import sys, types
        sys.modules["sglang.srt.utils.common"] = types.ModuleType("common")
        from stateful_sglang.cpu.platform import prepare
        try:
            prepare()
        except RuntimeError as error:
            print(error)
        """
    )
    assert "SGLANG_USE_CPU_ENGINE=1" in printed


def test_spawned_processes_are_prepared_by_importing_their_target() -> None:
    printed = run(
        """
        import pickle
        from stateful_sglang.server.processes import run_scheduler_process
        target = pickle.dumps(run_scheduler_process)
        import subprocess, sys
        code = (
            "import sys, pickle; pickle.loads(bytes.fromhex(sys.argv[1])); import os; "
            "print(os.environ['SGLANG_USE_CPU_ENGINE'], 'sgl_kernel' in sys.modules)"
        )
        import os
        os.environ.pop("SGLANG_USE_CPU_ENGINE")
        print(subprocess.run([sys.executable, "-c", code, target.hex()],
                             capture_output=True, text=True, check=True).stdout)
        """
    )
    assert printed == "1 True"
