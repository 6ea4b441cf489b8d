"""Before and after a change: the engines of two source trees, each with its own environment.

Both servers are started once and stay up, idle unless asked; they are measured in turns, so that
what the machine does meanwhile hits both. A slowdown is the time after over the time before, paired
by round, with its 95 % interval: above 1 it got slower. Of the other tree only the launcher and the
HTTP routes are used, so it may be of any age.

    git worktree add ../before COMMIT
    python -m bench trees --before ../before --before-python ../before/.venv/bin/python --rounds 8
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.engines import package
from bench.engines.arms import Arm, Setting
from bench.engines.dialects import SGLangDialect
from bench.engines.load import Load
from bench.engines.ours import interpreter, of_tree
from bench.engines.pair import AFTER, BEFORE, Pair
from bench.harness.figures import report
from bench.harness.machine import processor
from bench.harness.options import DEFAULT_LOCK, PEERS, Json, Lock, Rounds, Seed, ServerArguments
from bench.harness.rounds import alone, say
from bench.harness.server import Server, ServerDiedError, cpu_seconds
from bench.workloads.cells import Cell, plan

CHECKOUT = Path(__file__).resolve().parents[2]
ROUNDS = 8
IDLE_S, IDLE_CORES = 2.0, 0.05
"""An idle server is watched for so long, and should take less than this of a core."""


def known_cells() -> dict[str, Cell]:
    """Prefill and decode cells of a quick run, by name."""
    return {cell.name: cell for cell in plan(True, True).cells if cell.kind != "verify"}


def chosen_cells(names: str | None) -> list[Cell]:
    """Cells of a list of names with commas between; all without one."""
    known = known_cells()
    wanted = list(known) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known are {', '.join(known)}", param_hint="--cells"
        )
    return [known[name] for name in wanted]


def idle_cores(server: Server) -> float:
    """Cores that a server takes while nobody asks it anything."""
    before = cpu_seconds(server)
    time.sleep(IDLE_S)
    return (cpu_seconds(server) - before) / IDLE_S


def show(pair: Pair, console: Console) -> None:
    """A row for each cell."""
    grid = Table("cell", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("before, tokens/s", "after, tokens/s", "slowdown", "95 %", "rounds"):
        grid.add_column(column, justify="right")
    for cell in pair.cells:
        interval = pair.slowdown(cell)
        before, after = pair.speed(BEFORE, cell), pair.speed(AFTER, cell)
        if interval is None or before is None or after is None:
            grid.add_row(cell.name, "n/a")
            continue
        grid.add_row(
            cell.name,
            f"{before:.1f}",
            f"{after:.1f}",
            f"{interval.ratio:.3f}",
            f"{interval.low:.3f} to {interval.high:.3f}",
            str(interval.count),
        )
    console.print(grid)
    for cell, reason in pair.missing.items():
        console.print(f"{cell.name} is left out: {reason}", markup=False)


def main(
    before: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Source tree.")],
    before_python: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Of its environment.")
    ],
    after: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Source tree; by default this one.")
    ] = CHECKOUT,
    after_python: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Of its environment; by default this one."),
    ] = Path(sys.executable),
    rounds: Rounds = ROUNDS,
    cells: Annotated[
        str | None, typer.Option(help="Names with commas, such as prefill-512,decode-b1-c128.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; by default the embedded one.")
    ] = None,
    seed: Seed = None,
    lock: Lock = DEFAULT_LOCK,
    json_file: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Measure and print; exit status 1 where a server did not start, or a cell has no figure."""
    rounds = rounds or ROUNDS
    wanted = chosen_cells(cells)
    more = tuple(server_arguments or ())
    checkpoint = (model or package.default_model()).absolute()
    setting = Setting(checkpoint, PEERS, package.usable_cores())
    arms = [
        Arm(BEFORE, str(before), of_tree(before.absolute(), interpreter(before_python), *more)),
        Arm(AFTER, str(after), of_tree(after.absolute(), interpreter(after_python), *more)),
    ]
    began = time.monotonic()
    lengths: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        try:
            for arm in arms:
                servers[arm.name] = stack.enter_context(arm.start(setting)).server
                say(f"{arm.name}: ready in {servers[arm.name].start_s:.0f} s")
        except ServerDiedError as error:
            print(f"{arm.name} ({arm.what}) did not start: {error}", file=sys.stderr)
            return 1
        loads = {
            name: Load(server.url, SGLangDialect(), lengths) for name, server in servers.items()
        }
        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        pair = Pair(loads, wanted, random.Random(seed), vocabulary)
        with alone(lock):
            pair.warm_up()
        idle = {name: idle_cores(server) for name, server in servers.items()}
        for number in range(rounds):
            started = time.monotonic()
            with alone(lock):
                pair.round(number)
            say(f"round {number + 1}/{rounds} done ({time.monotonic() - started:.0f} s)")
        start_s = {name: round(server.start_s, 1) for name, server in servers.items()}
    show(pair, Console(highlight=False, width=None if sys.stdout.isatty() else 100))
    for name, cores in idle.items():
        if cores > IDLE_CORES:
            say(f"{name} took {cores:.2f} cores while idle: the other's times are too long")
    figures = pair.figures() | {f"idle_cores_{name}": round(c, 3) for name, c in idle.items()}
    seconds = {
        name: {cell.name: rounds for cell, rounds in measured.items()}
        for name, measured in pair.seconds.items()
    }
    about = {
        **{arm.name: arm.what for arm in arms},
        "model": checkpoint.name,
        "processor": processor(),
        "threads": setting.threads,
        "rounds": rounds,
        "start_s": start_s,
        "run_s": round(time.monotonic() - began, 1),
    }
    report(figures, json_file, seconds=seconds, about=about)
    return 1 if pair.missing else 0
