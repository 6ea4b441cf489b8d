"""Raw engine speed: no sessions, no drafts, ours beside stock SGLang, vLLM and llama.cpp.

Prefill, decode and verify steps of several sizes. Each round starts every arm once, one at a time
and in rotating order, with prompts of random tokens that no cache can have seen. Through a server
are measured: the time to the first token of a fresh prompt, and the tokens a second of streams that
decode at once. Our model forward is measured alone as well, verify steps only there. Beside each
figure stands its share of what this machine can do at most, measured in the same run.

    scripts/peers
    python -m bench engine --json engine.json --plot engine.png
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.engines import package
from bench.engines.arms import Setting
from bench.engines.catalogue import ARMS, chosen
from bench.engines.comparison import CELL_BUDGET_S, Course, EngineBench
from bench.harness import figures, report
from bench.harness.machine import processor
from bench.harness.options import DEFAULT_LOCK, PEERS, Json, Lock, Quick, Rounds, Seed


def main(
    arms: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(ARMS),
    rounds: Rounds = None,
    quick: Quick = False,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; by default the embedded one.")
    ] = None,
    peers: Annotated[Path, typer.Option(help="Of scripts/peers.")] = PEERS,
    seed: Seed = None,
    cell_budget: Annotated[
        float, typer.Option(metavar="S", help="Skip a cell whose prompts take longer.")
    ] = CELL_BUDGET_S,
    lock: Lock = DEFAULT_LOCK,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="A picture, .png or .svg.")] = None,
) -> int:
    """Measure and report; exit status 1 when an arm failed. 2 rounds, or 1 with --quick."""
    try:
        wanted = chosen(arms)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--arms") from error
    rounds = rounds or (1 if quick else 2)
    checkpoint = (model or package.default_model()).absolute()
    setting = Setting(checkpoint, peers.absolute(), package.usable_cores())
    began = time.monotonic()
    course = Course(rounds, quick, lock, cell_budget, seed)
    results = EngineBench(setting, wanted, course).run()
    took = time.monotonic() - began
    about = {
        "arms": {arm.name: arm.what for arm in wanted},
        "processor": processor(),
        "system": platform.platform(),
        "threads": setting.threads,
        "model": checkpoint.name,
        "rounds": rounds,
        "quick": quick,
        "run_s": round(took, 1),
    }
    report.show(results, {arm.name: arm.what for arm in wanted})
    measured = results.as_json()
    figures.report(measured.pop("figures"), json, **measured, about=about)
    if plot:
        from bench.harness.plot import plot as draw

        draw(results, plot)
    return 1 if results.failed else 0
