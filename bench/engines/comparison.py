"""Arms measured beside each other in rounds, cell by cell, and our forward without a server."""

from __future__ import annotations

import json
import random
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.engines import forward
from bench.engines.arms import CONTEXT, POOL_TOKENS, Arm, ArmUnavailableError, Setting
from bench.engines.load import Load, NeverTogetherError
from bench.harness import machine
from bench.harness.results import FORWARD, OURS, Results
from bench.harness.rounds import alone, rotated, say
from bench.harness.server import ServerDiedError
from bench.workloads.cells import Cell, Plan, all_cells, decode, plan, prefill
from bench.workloads.prompts import random_ids

CELL_BUDGET_S = 150.0
"""Longest that the prompts of one cell may take, unless told otherwise."""
DECODES, LONG_DECODE_S = 3, 5.0
"""Measurements of a decode cell in a round, unless one takes longer than this."""


@dataclass(frozen=True)
class Course:
    """What a run measures, and within which bounds."""

    rounds: int
    quick: bool
    lock: Path
    """Held while anything is measured."""
    cell_budget_s: float = CELL_BUDGET_S
    seed: int | None = None


class EngineBench:
    """One run: what is measured, and how."""

    def __init__(self, setting: Setting, arms: Sequence[Arm], course: Course) -> None:
        self.setting = setting
        self.plans = [plan(course.quick, number == 0) for number in range(course.rounds)]
        self._arms = {arm.name: arm for arm in arms}
        costs = {arm.name: arm.cost(setting) for arm in arms}
        if OURS in costs:
            costs[FORWARD] = setting.cost()
        self.results = Results(all_cells(self.plans), costs)
        self._budget = course.cell_budget_s
        self._pace: dict[str, float] = {}
        """Seconds a token of each arm's last prompt."""
        self._lock = course.lock
        self._random = random.Random(course.seed)
        self._vocabulary = json.loads((setting.model / "config.json").read_text())["vocab_size"]

    def run(self) -> Results:
        """All rounds. An arm that fails is noted and tried again in the next round."""
        columns = list(self.results.costs)
        for number in range(len(self.plans)):
            for column in rotated(columns, number):
                began = time.monotonic()
                with alone(self._lock):
                    # Often, because a limit is the best that was ever seen of the machine.
                    self.results.rates.append(machine.measure(self.setting.threads))
                    outcome = self._column(column, number)
                label = f"round {number + 1}/{len(self.plans)}: {column}"
                say(f"{label} {outcome} ({time.monotonic() - began:.0f} s)")
        return self.results

    def _column(self, column: str, number: int) -> str:
        try:
            if column == FORWARD:
                self._measure_forward(number)
            else:
                self._measure_arm(self._arms[column], number)
        except (ArmUnavailableError, ServerDiedError, forward.ForwardError) as error:
            self.results.failed[column] = str(error)
            return f"failed: {_first_line(error)}"
        except Exception as error:  # A peer may fail in any way; the others still count.
            self.results.failed[column] = traceback.format_exc()
            return f"failed: {type(error).__name__}: {_first_line(error)}"
        return "done"

    def _measure_forward(self, number: int) -> None:
        arguments = ["--stateful", "off", "--model-path", str(self.setting.model)]
        arguments += ["--max-total-tokens", str(POOL_TOKENS), "--context-length", str(CONTEXT)]
        wanted = self.plans[number]
        times = forward.measure(arguments, wanted, self.setting.threads)
        for cell in wanted.cells:
            for seconds in times[cell.name]:
                self.results.add(FORWARD, cell, number, seconds)

    def _measure_arm(self, arm: Arm, number: int) -> None:
        began = time.monotonic()
        with arm.start(self.setting) as (_, load):
            self.results.start_s[arm.name].append(time.monotonic() - began)
            load.first_token_s(self._prompt(64))
            load.decode_rate([self._prompt(64)], 8)
            wanted = self.plans[number]
            contexts = dict(wanted.contexts)
            for length in wanted.prefills:
                if length not in contexts:
                    self._prefills(arm, load, number, length, wanted.prompts)
            for context, batch in contexts.items():
                self._context(arm, load, number, wanted, context, batch)

    def _prefills(self, arm: Arm, load: Load, number: int, length: int, count: int) -> None:
        for _ in range(self._affordable(arm, prefill(length), count)):
            _, took = self._fresh_prompt(arm, load, length)
            self.results.add(arm.name, prefill(length), number, took)

    def _fresh_prompt(
        self, arm: Arm, load: Load, length: int, slot: int = 0
    ) -> tuple[list[int], float]:
        """A prompt that the engine has not seen before, and the seconds to its first token."""
        prompt = self._prompt(length)
        took = load.first_token_s(prompt, slot)
        self._pace[arm.name] = took / length
        return prompt, took

    def _affordable(self, arm: Arm, cell: Cell, count: int) -> int:
        """How many of `count` prompts of a cell there is time for, judged by the prompt before."""
        expected = self._pace.get(arm.name, 0.0) * max(cell.context, cell.width)
        if expected > self._budget:
            self.results.missing[arm.name, cell] = f"a prompt would take about {expected:.0f} s"
            return 0
        return count if count * expected <= self._budget else max(1, int(self._budget / expected))

    def _context(
        self, arm: Arm, load: Load, number: int, wanted: Plan, context: int, batch: int
    ) -> None:
        """Fill the contexts of a decode cell, which are fresh prompts, then decode on them.

        The prompts are in the engines' prefix caches when the streams start, so that all streams
        decode from about the same moment.
        """
        prompts: list[list[int]] = []
        times: list[float] = []
        batches = sorted(b for b, c in wanted.decodes if c == context)
        for size in batches:
            cell = decode(size, context)
            affordable = self._affordable(arm, cell, min(wanted.prompts, batch))
            if not affordable:
                continue
            expected = statistics.median(times) * (size - len(prompts)) if times else 0.0
            if expected > self._budget:
                self.results.missing[arm.name, cell] = (
                    f"filling {size} contexts would take about {expected:.0f} s"
                )
                continue
            while len(prompts) < max(size, affordable):
                prompt, took = self._fresh_prompt(arm, load, context, len(prompts))
                prompts.append(prompt)
                times.append(took)
            try:
                self._decodes(arm, load, number, cell, prompts[:size], wanted.tokens)
            except NeverTogetherError as error:
                self.results.missing[arm.name, cell] = str(error)
        if context in wanted.prefills:
            for took in times:
                self.results.add(arm.name, prefill(context), number, took)
            self._prefills(arm, load, number, context, wanted.prompts - len(times))

    def _decodes(
        self,
        arm: Arm,
        load: Load,
        number: int,
        cell: Cell,
        prompts: list[list[int]],
        tokens: int,
    ) -> None:
        for _ in range(DECODES):
            began = time.monotonic()
            rate = load.decode_rate(prompts, tokens)
            self.results.add(arm.name, cell, number, cell.batch / rate)
            if time.monotonic() - began > LONG_DECODE_S:
                break

    def _prompt(self, length: int) -> list[int]:
        return random_ids(self._random, length, self._vocabulary)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
