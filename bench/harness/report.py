"""The engine bench's results for people, as a table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.harness.machine import processor
from bench.harness.results import FORWARD, OURS, Results
from bench.workloads.cells import Cell

WIDTH = 160
"""Columns of a table that no terminal sets the width of."""


def show(results: Results, arms: Mapping[str, str], console: Console | None = None) -> None:
    """Print the table, and the reasons for gaps; plain where no terminal reads it."""
    if console is None:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    rates = results.limit_rates
    console.print(
        f"{processor()}: reads {rates.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"products {rates.bf16_ops_per_s / 1e9:.0f} GFLOP/s in bf16 and "
        f"{rates.f32_ops_per_s / 1e9:.0f} in float32\n"
        "tokens/s: median (lowest to highest), and the share of this machine's limit, which is of "
        "the faster products"
    )
    console.print(table(results))
    shares = [results.share(column, cell) for column in results.costs for cell in results.cells]
    if any(share is not None and share > 1 for share in shares):
        console.print(
            "A share above 100%: this machine was disturbed whenever its limits were measured, or "
            "torch does not reach them. Run this bench on a machine that does nothing else.\n"
        )
    for name, what in arms.items():
        started = results.start_s.get(name)
        ready = f", ready in {min(started):.0f} to {max(started):.0f} s" if started else ""
        console.print(f"{name}: {what}{ready}", markup=False)
    if FORWARD in results.costs:
        console.print(f"{FORWARD}: the model forward of {OURS}, without a server")
    for name, reason in results.failed.items():
        console.print(f"\n{name} FAILED: {reason}", markup=False)
    for (column, cell), reason in results.missing.items():
        console.print(f"{column} has no {cell.name}: {reason}", markup=False)
    console.print()


def table(results: Results) -> Table:
    """One row a cell, one column an arm."""
    columns = list(results.costs)
    grid = Table("cell", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        grid.add_column(column, justify="right")
    kind = None
    for cell in results.cells:
        if kind not in (None, cell.kind):
            grid.add_section()
        kind = cell.kind
        grid.add_row(cell.name, *(_entry(results, column, cell) for column in columns))
    return grid


def _entry(results: Results, column: str, cell: Cell) -> str:
    speed = results.speed(column, cell)
    if speed is None:
        return "n/a"
    share = results.share(column, cell)
    limit = "" if share is None else f" {share:4.0%}"
    spread = f"({speed.low:.0f} to {speed.high:.0f})" if speed.count > 1 else ""
    return f"{speed.median:.1f} {spread}{limit}"
