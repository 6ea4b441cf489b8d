"""Where the time of a step goes: the kernels' parts, SGLang's Python around them, and the server.

A decode of one token and a verify of eight, alone, then the same decode through the server. The
parts of the layers are told by the kernels' own clock, waiting for the other threads included.

    python -m bench.suites.profile [--json FILE] [any argument of the launcher: --cpu-quant int8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.engines.load import Load, SGLangDialect
from bench.harness.server import serve
from bench.workloads.cells import Cell, decode, verify

CELLS = (decode(1, 128), decode(1, 2048), verify(8, 128), verify(8, 2048))
LAYERS, HEAD, REST, SERVER = "all layers", "LM head", "SGLang's Python", "server around the step"
STREAMS, TOKENS = 5, 64


class Part(NamedTuple):
    """A part of a step."""

    name: str
    milliseconds: float


class Stopwatch:
    """Seconds spent in a function, call by call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        began = time.perf_counter()
        result = self._function(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result


def profile(arguments: list[str]) -> dict[str, list[Part]]:
    """Parts of each cell's step, by its name.

    Raises:
        ValueError: The model is not computed in one call, which is what has a clock.
    """
    import torch

    from bench.engines.forward import Steps
    from stateful_sglang.cpu import abi, modules

    steps = Steps(arguments)
    stack = modules.stack_of(steps.model)
    if stack is None:
        raise ValueError(
            "this model is computed layer by layer, and only the decoder stack has a clock; "
            "expected a dense model of a family in stateful_sglang/cpu/families/"
        )
    layers, head = Stopwatch(stack.run), Stopwatch(steps.model.lm_head.quant_method.apply)
    stack.run, steps.model.lm_head.quant_method.apply = layers, head
    stack.clock = torch.zeros(len(abi.PARTS), dtype=torch.int64)
    return {cell.name: _parts(steps, cell, stack.clock, layers, head, abi.PARTS) for cell in CELLS}


def _parts(
    steps: Any, cell: Cell, clock: Any, layers: Stopwatch, head: Stopwatch, names: tuple[str, ...]
) -> list[Part]:
    clock.zero_()
    layers.seconds = head.seconds = 0.0
    times = steps.repeat(cell)
    count = len(times) + 1  # The one that warms up is on the clocks, but not among the times.
    milliseconds = [nanoseconds / count / 1e6 for nanoseconds in clock.tolist()]
    inside, product = 1e3 * layers.seconds / count, 1e3 * head.seconds / count
    rest = max(0.0, 1e3 * statistics.mean(times) - inside - product)
    return [
        *map(Part, names, milliseconds),
        Part("calling the layers", max(0.0, inside - sum(milliseconds))),
        Part(HEAD, product),
        Part(REST, rest),
    ]


def server_ms(arguments: list[str], context: int) -> float:
    """Milliseconds a token of one stream through the server, the median of some streams."""
    chance = random.Random()
    with serve(*arguments, "--stateful", "off") as server:
        load = Load(server.url, SGLangDialect())
        prompts = [[chance.randrange(100, 40000) for _ in range(context)] for _ in range(STREAMS)]
        return 1e3 / statistics.median(load.decode_rate([p], TOKENS) for p in prompts)


def show(cells: dict[str, list[Part]], served: dict[str, float], console: Console) -> None:
    """Print a table: a row for each part, a column for each step."""
    grid = Table("part of a step, ms", box=SIMPLE_HEAD, pad_edge=False)
    for name in cells:
        grid.add_column(name, justify="right")
    columns = list(cells.values())
    totals = [sum(part.milliseconds for part in column) for column in columns]
    for row in zip(*columns, strict=True):
        values = zip(row, totals, strict=True)
        grid.add_row(row[0].name, *(_entry(p.milliseconds, total) for p, total in values))
    grid.add_section()
    grid.add_row("the model's forward", *(f"{total:.2f}     " for total in totals))
    around = [
        f"{served[name] - total:.2f}     " if name in served else ""
        for name, total in zip(cells, totals, strict=True)
    ]
    grid.add_row(SERVER, *around)
    console.print(grid)


def _entry(milliseconds: float, total: float) -> str:
    return f"{milliseconds:.2f} {milliseconds / total:4.0%}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args, arguments = parser.parse_known_args()
    from stateful_sglang.server.machine import usable_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    served = {
        cell.name: server_ms(arguments, cell.context) for cell in CELLS if cell.kind == "decode"
    }
    cells = profile(["--stateful", "off", *arguments])
    show(cells, served, Console(highlight=False, width=100))
    if args.json:
        parts = {name: dict(column) for name, column in cells.items()}
        args.json.write_text(json.dumps({"parts_ms": parts, "server_ms": served}, indent=1))


if __name__ == "__main__":
    main()
