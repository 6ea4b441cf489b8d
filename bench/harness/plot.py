"""The engine bench's results as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness.machine import processor
from bench.harness.results import FORWARD, Results
from bench.workloads.cells import Cell


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


def _bars(axis: Any, results: Results, cells: list[Cell], labels: list[str]) -> None:
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


def _verify(axis: Any, results: Results) -> None:
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
