"""Two running servers measured in turns: each measurement of one stands beside one of the other.

Both stay up. A cell's prompts are the same for both; contexts to decode on are filled once, and
prefills are of prompts that neither has seen. Who is asked first changes with every measurement.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.engines.load import Load, NeverTogetherError
from bench.harness.rounds import rotated
from bench.harness.stats import Interval, paired_interval
from bench.workloads.cells import Cell
from bench.workloads.prompts import random_ids

BEFORE, AFTER = "before", "after"
TOKENS = 40
"""Decoded by each stream, at least."""
CELL_S = 5.0
"""Once a cell has taken so long in a round, it is not measured again in it: that bounds a run."""


@dataclass
class Pair:
    """What was measured of two servers."""

    loads: Mapping[str, Load]
    """By `BEFORE` and `AFTER`."""
    cells: Sequence[Cell]
    rng: random.Random
    vocabulary: int
    repeats: int = 5
    """Most measurements of a cell in a round."""
    seconds: dict[str, dict[Cell, dict[int, list[float]]]] = field(default_factory=dict)
    """Seconds a step by server, cell and round; a step is a whole prompt, or a token a stream."""
    missing: dict[Cell, str] = field(default_factory=dict)
    """Why a cell has no figures."""
    _contexts: dict[int, list[list[int]]] = field(default_factory=dict)

    def warm_up(self) -> None:
        """Fill the contexts of all decode cells, and decode a little."""
        for cell in self.cells:
            if cell.kind == "decode":
                filled = self._contexts.setdefault(cell.context, [])
                while len(filled) < cell.batch:
                    prompt = self._prompt(cell.context)
                    for load in self.loads.values():
                        load.first_token_s(prompt)
                    filled.append(prompt)
        for load in self.loads.values():
            load.first_token_s(self._prompt(64))
            load.decode_rate([self._prompt(64)], 8)

    def round(self, number: int) -> None:
        """Measure every cell on both, up to `repeats` times."""
        for cell in self.cells:
            end = time.monotonic() + CELL_S
            for repeat in range(self.repeats):
                if cell in self.missing or (repeat and time.monotonic() > end):
                    break
                prompt = self._prompt(cell.width)
                for name in rotated(tuple(self.loads), number + repeat):
                    self._measure(name, cell, number, prompt)

    def times(self, name: str, cell: Cell) -> dict[int, float]:
        """Median seconds a step of each round."""
        rounds = self.seconds.get(name, {}).get(cell, {})
        return {number: statistics.median(values) for number, values in rounds.items()}

    def slowdown(self, cell: Cell) -> Interval | None:
        """Time after over time before: above 1 it got slower.

        A round counts as the median of its pairs, which were measured one right after the other.
        """
        if cell in self.missing:
            return None
        after = self.seconds.get(AFTER, {}).get(cell, {})
        before = self.seconds.get(BEFORE, {}).get(cell, {})
        ratios = {
            number: statistics.median(a / b for a, b in zip(taken, before[number], strict=True))
            for number, taken in after.items()
        }
        return paired_interval(ratios, dict.fromkeys(ratios, 1.0))

    def speed(self, name: str, cell: Cell) -> float | None:
        """Tokens a second, the median of the rounds."""
        times = self.times(name, cell)
        return cell.tokens / statistics.median(times.values()) if times else None

    def figures(self) -> dict[str, float | None]:
        """Each cell's slowdown with its interval, and the worst of them."""
        found: dict[str, float | None] = {}
        intervals = {cell: self.slowdown(cell) for cell in self.cells}
        for cell, interval in intervals.items():
            name = f"slowdown_{cell.name}"
            found[name] = interval.ratio if interval else None
            found[f"{name}_low"] = interval.low if interval else None
            found[f"{name}_high"] = interval.high if interval else None
        measured = [interval for interval in intervals.values() if interval]
        found["slowdown_worst"] = max((one.ratio for one in measured), default=None)
        found["slowdown_worst_high"] = max((one.high for one in measured), default=None)
        return found

    def _measure(self, name: str, cell: Cell, number: int, prompt: list[int]) -> None:
        load = self.loads[name]
        if cell.kind == "prefill":
            took = load.first_token_s(prompt)
        else:
            try:
                rate = load.decode_rate(self._contexts[cell.context][: cell.batch], TOKENS)
            except NeverTogetherError as error:
                self.missing[cell] = f"{name}: {error}"
                return
            took = cell.batch / rate
        rounds = self.seconds.setdefault(name, {}).setdefault(cell, {})
        rounds.setdefault(number, []).append(took)

    def _prompt(self, length: int) -> list[int]:
        return random_ids(self.rng, length, self.vocabulary)
