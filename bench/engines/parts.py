"""Our forward taken apart: what the kernels' own clock says, and what is called around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.engines.forward import Steps
from bench.workloads.cells import Cell

HEAD, REST = "LM head", "SGLang's Python"


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


def profile(arguments: list[str], cells: Sequence[Cell]) -> dict[str, list[Part]]:
    """Parts of each cell's step, by its name.

    Raises:
        ValueError: The model is not computed in one call, which is what has a clock.
    """
    import torch

    from stateful_sglang.cpu import abi, modules

    steps = Steps(arguments)
    stack = modules.stack_of(steps.model)
    if stack is None:
        raise ValueError(
            "this model is computed layer by layer, and only the decoder stack has a clock; "
            "expected a dense model of a family in stateful_sglang/cpu/dense_models.py"
        )
    layers, head = Stopwatch(stack.run), Stopwatch(steps.model.lm_head.quant_method.apply)
    stack.run, steps.model.lm_head.quant_method.apply = layers, head
    stack.clock = torch.zeros(len(abi.PARTS), dtype=torch.int64)
    return {cell.name: _parts(steps, cell, stack.clock, layers, head, abi.PARTS) for cell in cells}


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
