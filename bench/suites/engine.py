"""Raw engine speed: no sessions, no drafts, ours beside stock SGLang, vLLM and llama.cpp.

Prefill, decode and verify steps of several sizes. Each round starts every arm once, one at a time
and in rotating order, with prompts of random tokens that no cache can have seen. Through a server
are measured: the time to the first token of a fresh prompt, and the tokens a second of streams that
decode at once. Our model forward is measured alone as well, verify steps only there. Beside each
figure stands its share of what this machine can do at most, measured in the same run.

    scripts/peers
    python -m bench.suites.engine --json engine.json --plot engine.png
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import platform
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bench.engines import forward
from bench.engines.arms import ARMS, CONTEXT, POOL_TOKENS, Arm, ArmUnavailableError, Setting
from bench.engines.load import Load, NeverTogetherError
from bench.harness import machine, report
from bench.harness.results import FORWARD, OURS, Results
from bench.harness.server import ServerDiedError
from bench.workloads.cells import Cell, Plan, all_cells, decode, plan, prefill

CHECKOUT = Path(__file__).resolve().parents[2]
CELL_BUDGET_S = 150.0
"""Longest that the prompts of one cell may take, unless told otherwise."""
DECODES, LONG_DECODE_S = 3, 5.0
"""Measurements of a decode cell in a round, unless one takes longer than this."""


class EngineBench:
    """One run: what is measured, and how."""

    def __init__(self, setting: Setting, arms: list[Arm], args: argparse.Namespace) -> None:
        self.setting = setting
        self.arms = arms
        self.plans = [plan(args.quick, number == 0) for number in range(args.rounds)]
        costs = {arm.name: arm.cost(setting) for arm in arms}
        if OURS in costs:
            costs[FORWARD] = setting.cost()
        self.results = Results(all_cells(self.plans), costs)
        self._budget = args.cell_budget
        self._pace: dict[str, float] = {}
        """Seconds a token of each arm's last prompt."""
        self._lock = args.lock
        self._random = random.Random(args.seed)
        self._vocabulary = json.loads((setting.model / "config.json").read_text())["vocab_size"]
        self._say = Console(stderr=True, highlight=False)

    def run(self) -> Results:
        """All rounds. An arm that fails is noted and tried again in the next round."""
        columns = list(self.results.costs)
        for number in range(len(self.plans)):
            turn = number % len(columns)
            for column in columns[turn:] + columns[:turn]:
                began = time.monotonic()
                with self._alone():
                    # Often, because a limit is the best that was ever seen of the machine.
                    self.results.rates.append(machine.measure())
                    outcome = self._column(column, number)
                label = f"round {number + 1}/{len(self.plans)}: {column}"
                self._say.print(f"{label} {outcome} ({time.monotonic() - began:.0f} s)")
        return self.results

    def _column(self, column: str, number: int) -> str:
        try:
            if column == FORWARD:
                self._measure_forward(number)
            else:
                self._measure_arm(ARMS[column], number)
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
        with arm.start(self.setting) as load:
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
        return [self._random.randrange(100, self._vocabulary - 100) for _ in range(length)]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock that keeps benches on this machine from measuring each other."""
        with self._lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="default: 2, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer cells, a few minutes")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the embedded one")
    parser.add_argument("--peers", type=Path, default=CHECKOUT / ".peers", help="of scripts/peers")
    parser.add_argument("--seed", type=int, help="of the prompts; default: new ones every run")
    parser.add_argument(
        "--cell-budget",
        type=float,
        default=CELL_BUDGET_S,
        metavar="S",
        help="skip a cell whose prompts take longer, default %(default)s",
    )
    default_lock = Path(tempfile.gettempdir()) / "stateful-sglang-bench.lock"
    parser.add_argument(
        "--lock", type=Path, default=default_lock, help="held while anything is measured"
    )
    parser.add_argument("--json", type=Path, help="every cell, and the figures")
    parser.add_argument("--plot", type=Path, help="a picture of them, .png or .svg")
    return parser


def _chosen(parser: argparse.ArgumentParser, names: str) -> list[Arm]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ARMS]:
        parser.error(f"unknown arm {', '.join(unknown)}; known are {', '.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(wanted)]


def main() -> int:
    """Measure and report; exit status 1 when an arm failed."""
    parser = _parser()
    args = parser.parse_args()
    if args.rounds is None:
        args.rounds = 1 if args.quick else 2
    arms = _chosen(parser, args.arms)
    from stateful_sglang.embedded.cache import ensure_default_model
    from stateful_sglang.server.machine import usable_cores

    model = args.model or ensure_default_model()
    setting = Setting(model.absolute(), args.peers.absolute(), usable_cores())
    began = time.monotonic()
    results = EngineBench(setting, arms, args).run()
    took = time.monotonic() - began
    report.show(results, {arm.name: arm.what for arm in arms})
    if args.json:
        about = {
            "arms": {arm.name: arm.what for arm in arms},
            "processor": report.processor(),
            "system": platform.platform(),
            "threads": setting.threads,
            "model": model.name,
            "rounds": args.rounds,
            "quick": args.quick,
            "run_s": round(took, 1),
        }
        args.json.write_text(json.dumps({**results.as_json(), "about": about}, indent=1))
    if args.plot:
        report.plot(results, args.plot)
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
