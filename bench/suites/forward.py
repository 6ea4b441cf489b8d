"""Times of our model forward alone, without a server: prefill, decode and verify steps.

python -m bench forward --quick
python -m bench forward -- --cpu-quant int8
"""

from __future__ import annotations

from statistics import median

from bench.engines import package
from bench.engines.forward import measure
from bench.harness.figures import report
from bench.harness.options import Json, Quick, ServerArguments
from bench.workloads.cells import plan


def main(quick: Quick = False, json: Json = None, server_arguments: ServerArguments = None) -> None:
    """Measure once and print the medians, in milliseconds."""
    arguments = ["--stateful", "off", *(server_arguments or ())]
    times = measure(arguments, plan(quick, True), package.usable_cores())
    figures = {f"{name}_ms": round(1e3 * median(passes), 3) for name, passes in times.items()}
    report(figures, json, seconds=times)
