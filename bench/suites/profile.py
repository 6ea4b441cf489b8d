"""Where the time of a step goes: the kernels' parts, SGLang's Python around them, and the server.

A decode of one token and a verify of eight, alone, then the same decode through the server. The
parts of the layers are told by the kernels' own clock, waiting for the other threads included.

    python -m bench profile --json profile.json -- --cpu-quant int8
"""

from __future__ import annotations

import os
import random
import statistics

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.engines import package
from bench.engines.dialects import SGLangDialect
from bench.engines.load import Load
from bench.engines.parts import Part, profile
from bench.harness.figures import report
from bench.harness.options import Json, ServerArguments
from bench.harness.server import serve
from bench.workloads.cells import decode, verify
from bench.workloads.prompts import random_ids

CELLS = (decode(1, 128), decode(1, 2048), verify(8, 128), verify(8, 2048))
SERVER = "server around the step"
STREAMS, TOKENS = 5, 64


def server_ms(arguments: list[str], context: int) -> float:
    """Milliseconds a token of one stream through the server, the median of some streams."""
    chance = random.Random()
    with serve(*arguments, "--stateful", "off") as server:
        load = Load(server.url, SGLangDialect())
        prompts = [random_ids(chance, context, 40_000) for _ in range(STREAMS)]
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


def main(json: Json = None, server_arguments: ServerArguments = None) -> None:
    """Measure and print."""
    arguments = list(server_arguments or ())
    os.environ.setdefault("OMP_NUM_THREADS", str(package.usable_cores()))
    served = {
        cell.name: server_ms(arguments, cell.context) for cell in CELLS if cell.kind == "decode"
    }
    cells = profile(["--stateful", "off", *arguments], CELLS)
    show(cells, served, Console(highlight=False, width=100))
    figures = {
        f"{name}_forward_ms": round(sum(part.milliseconds for part in column), 3)
        for name, column in cells.items()
    }
    figures |= {f"{name}_server_ms": round(ms, 3) for name, ms in served.items()}
    parts = {name: dict(column) for name, column in cells.items()}
    report(figures, json, parts_ms=parts, server_ms=served)
