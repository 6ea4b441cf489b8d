"""The engine bench's results for people: a table in the terminal, and a picture."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.harness.results import FORWARD, OURS, Results
from bench.workloads.cells import Cell

WIDTH = 160
"""Columns of a table that no terminal sets the width of."""


def show(results: Results, arms: Mapping[str, str], console: Console | None = None) -> None:
    """Print the table, the reasons for gaps, and the figures; plain where no terminal reads it."""
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
    for name, value in results.figures().items():
        console.print(f"{name:28} {'not measured' if value is None else f'{value:.3f}'}")


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


def plot(results: Results, path: Path) -> None:
    """Draw tokens a second of every arm with their spread, and what a wider verify step costs.

    Raises:
        ImportError: matplotlib is missing; ``pip install matplotlib`` brings it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prefills = [cell for cell in results.cells if cell.kind == "prefill"]
    contexts = sorted({cell.context for cell in results.cells if cell.kind == "decode"})
    figure, axes = pyplot.subplots(
        1, len(contexts) + 2, figsize=(4.2 * (len(contexts) + 2), 4.4), layout="constrained"
    )
    _bars(axes[0], results, prefills, [str(cell.width) for cell in prefills])
    axes[0].set(title="prefill", xlabel="tokens of the prompt")
    for axis, context in zip(axes[1:], contexts, strict=False):
        cells = [c for c in results.cells if c.kind == "decode" and c.context == context]
        _bars(axis, results, cells, [str(cell.batch) for cell in cells])
        axis.set(title=f"decode at {context} tokens of context", xlabel="streams")
    _verify(axes[-1], results)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)))
    figure.suptitle(f"{processor()}; the line on a bar is the spread, the dash the machine's limit")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis, results: Results, cells: list[Cell], labels: list[str]) -> None:
    columns = list(results.costs)
    width = 0.85 / max(1, len(columns))
    for number, column in enumerate(columns):
        places, heights, spreads, limits = [], [], [], []
        for place, cell in enumerate(cells):
            speed, share = results.speed(column, cell), results.share(column, cell)
            if speed is None:
                continue
            places.append(place + (number - (len(columns) - 1) / 2) * width)
            heights.append(speed.median)
            spreads.append((speed.median - speed.low, speed.high - speed.median))
            limits.append(speed.median / share if share else speed.median)
        errors = list(zip(*spreads, strict=True)) if spreads else None
        axis.bar(places, heights, width, yerr=errors, label=column, color=f"C{number}")
        axis.scatter(places, limits, marker="_", s=60, color="0.3", zorder=3)
    axis.set_xticks(range(len(cells)), labels)
    if axis.patches:  # An empty axis has no logarithm.
        axis.set_yscale("log")
    axis.set_ylabel("tokens/s")
    axis.grid(axis="y", alpha=0.3)


def _verify(axis, results: Results) -> None:
    cells = [cell for cell in results.cells if cell.kind == "verify"]
    for context in sorted({cell.context for cell in cells}):
        points = [
            (cell.width, 1e3 * took.median)
            for cell in cells
            if cell.context == context and (took := results.summary(FORWARD, cell)) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=f"context {context}")
    axis.set(title=f"verify step ({FORWARD})", xlabel="tokens verified", ylabel="ms a step")
    axis.set_xticks(sorted({cell.width for cell in cells}))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="small")


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
