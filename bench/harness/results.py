"""What the engine bench measured, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.limits import ModelCost, Rates, limit_s, work
from bench.harness.stats import Summary, paired_ratio, summarise
from bench.workloads.cells import SPEED_CONTEXT, VERIFY_CONTEXTS, Cell, decode, prefill, verify

OURS, FORWARD, VLLM = "ours", "forward", "vllm"
"""Names of columns; `FORWARD` is our model forward without a server."""

Rounds = dict[int, list[float]]
"""Measurements by round."""


@dataclass
class Results:
    """Seconds a step of every column and cell, by round.

    A step is the whole prompt of a prefill, and one token for each request of a decode.
    """

    cells: list[Cell]
    costs: dict[str, ModelCost]
    """By column."""
    seconds: dict[str, dict[Cell, Rounds]] = field(default_factory=dict)
    missing: dict[tuple[str, Cell], str] = field(default_factory=dict)
    """Why a column has no figure for a cell."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a column has no figures, or not all."""
    start_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rates: list[Rates] = field(default_factory=list)
    """Of the machine, measured before every column of every round."""

    def add(self, column: str, cell: Cell, number: int, seconds: float) -> None:
        """Record one step of a round."""
        rounds = self.seconds.setdefault(column, {}).setdefault(cell, {})
        rounds.setdefault(number, []).append(seconds)

    @property
    def limit_rates(self) -> Rates:
        """The best ever seen of the machine: others may have disturbed the rest."""
        return Rates(*(max(values) for values in zip(*self.rates, strict=True)))

    def medians(self, column: str, cell: Cell) -> dict[int, float]:
        """Median seconds of each round that measured the cell."""
        rounds = self.seconds.get(column, {}).get(cell, {})
        return {number: statistics.median(values) for number, values in rounds.items()}

    def summary(self, column: str, cell: Cell) -> Summary | None:
        """Seconds a step: median of the rounds' medians, and extremes of all measurements."""
        medians = self.medians(column, cell)
        if not medians:
            return None
        every = summarise([v for values in self.seconds[column][cell].values() for v in values])
        return every._replace(median=statistics.median(medians.values()))

    def speed(self, column: str, cell: Cell) -> Summary | None:
        """Tokens a second."""
        took = self.summary(column, cell)
        if took is None:
            return None
        return Summary(
            cell.tokens / took.median, cell.tokens / took.high, cell.tokens / took.low, took.count
        )

    def share(self, column: str, cell: Cell) -> float | None:
        """The machine's limit over the time taken: 1 cannot be beaten."""
        took = self.summary(column, cell)
        if took is None or not self.rates:
            return None
        return limit_s(self.costs[column], cell, self.limit_rates) / took.median

    def speedup(self, cell: Cell, over: str) -> Summary | None:
        """Our tokens a second over another arm's, paired by round, through the servers."""
        return paired_ratio(self.medians(over, cell), self.medians(OURS, cell))

    def figures(self) -> dict[str, float | None]:
        """The figures that decide; None where they were not measured."""
        batch1, batch16 = decode(1, SPEED_CONTEXT), decode(16, SPEED_CONTEXT)
        return {
            "decode_b1_vs_vllm": _median(self.speedup(batch1, VLLM)),
            "decode_b1_limit_share": self.share(FORWARD, batch1),
            "decode_b16_vs_vllm": _median(self.speedup(batch16, VLLM)),
            "prefill2048_vs_vllm": _median(self.speedup(prefill(2048), VLLM)),
            "prefill2048_limit_share": self.share(FORWARD, prefill(2048)),
            "verify8_over_decode1": self._verify_over_decode(8),
        }

    def as_json(self) -> dict[str, Any]:
        """Every cell of every column, with limits, ratios and reasons."""
        columns = list(self.costs)
        return {
            "figures": self.figures(),
            "cells": [self._cell_json(cell, columns) for cell in self.cells],
            "rates": [rate._asdict() for rate in self.rates],
            "start_s": dict(self.start_s),
            "failed": self.failed,
        }

    def _verify_over_decode(self, width: int) -> float | None:
        """The worst over the contexts that the figure is about."""
        ratios = []
        for context in VERIFY_CONTEXTS:
            ratio = paired_ratio(
                self.medians(FORWARD, verify(width, context)),
                self.medians(FORWARD, decode(1, context)),
            )
            if ratio is not None:
                ratios.append(ratio.median)
        return max(ratios, default=None)

    def _cell_json(self, cell: Cell, columns: Sequence[str]) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for column in columns:
            speed = self.speed(column, cell)
            if speed is None:
                reason = self.missing.get((column, cell)) or self.failed.get(column)
                measured[column] = {"missing": reason or "not measured"}
                continue
            needed = work(self.costs[column], cell)
            measured[column] = {
                "tokens_per_s": speed._asdict(),
                "seconds_by_round": _plain(self.seconds[column][cell]),
                "limit_share": self.share(column, cell),
                "least_bytes": needed.bytes,
                "least_operations": needed.operations,
            }
        ratios = {
            column: ratio._asdict()
            for column in columns
            if column not in (OURS, FORWARD) and (ratio := self.speedup(cell, column)) is not None
        }
        return {"name": cell.name, **cell._asdict(), "columns": measured, "ours_over": ratios}


def _plain(rounds: Mapping[int, list[float]]) -> dict[str, list[float]]:
    return {str(number): values for number, values in rounds.items()}


def _median(summary: Summary | None) -> float | None:
    return None if summary is None else summary.median
