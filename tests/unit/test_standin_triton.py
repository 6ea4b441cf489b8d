"""The stand-in for Triton lets kernels be defined and named, and never pretends to run one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stateful_sglang.cpu.standin import triton

MODULE = """
import importlib.util, sys
from stateful_sglang.cpu.standin import triton as standin
standin.install()
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime.autotuner import OutOfResources

@triton.autotune(configs=[triton.Config({"BLOCK": 4}, num_warps=2)], key=["n"])
@triton.heuristics({"EVEN": lambda args: True})
@triton.jit(do_not_specialize=["n"])
def kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x, 1)

print(kernel.__name__, triton.cdiv(7, 2), triton.next_power_of_2(5), triton.IS_STANDIN)
try:
    kernel[(1,)](None, 1, BLOCK=4)
except standin.TritonMissingError as error:
    print(error)
"""


def test_a_module_of_kernels_imports_and_no_kernel_runs() -> None:
    # In a process of its own, whose `triton` may be the real one's absence or not at all.
    code = f"import sys; sys.modules.pop('triton', None)\n{HIDE}{MODULE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "kernel 4 8 True"
    assert "kernel was launched, but Triton is not installed" in second


HIDE = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path:
            if type(finder).__module__ == "stateful_sglang.cpu.standin.triton":
                return finder.find_spec(name, path, target)
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_host_side_helpers_compute(n: int) -> None:
    assert triton.cdiv(n, 4) == -(-n // 4)
    power = triton.next_power_of_2(n)
    assert power >= max(n, 1)
    assert power & (power - 1) == 0
    assert power < 2 * max(n, 1)


def test_a_kernel_keeps_its_function() -> None:
    @triton.jit
    def add(x: int) -> int:
        """Doubles."""
        return 2 * x

    assert add.fn(3) == 6
    assert add.__doc__ == "Doubles."
    with pytest.raises(triton.TritonMissingError, match="add was launched"):
        add(3)
    with pytest.raises(triton.TritonMissingError, match="add was launched"):
        add.run(3)


def test_torch_sees_no_triton_in_the_stand_in() -> None:
    code = (
        f"import sys\n{HIDE}\n"
        "from stateful_sglang.cpu.standin import triton; triton.install()\n"
        "from torch.utils._triton import has_triton; assert not has_triton()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
