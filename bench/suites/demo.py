"""A coding agent's tool calls, held by the server as sessions and, for comparison, sent every time.

Two agents take turns on one system prompt and the same four tools, which run on this repository.
The same conversation then goes statelessly to the same build with `--stateful off`: the recorded
messages and answers, greedy in both. Arms run one server at a time, and alternate once more where
the time allows.

    scripts/demo [--turns N] [--json FILE] [--keep-serving]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from bench.engines.dialogues import Arm, Head, StatefulArm, StatelessArm, Turn
from bench.harness import demo_report
from bench.harness.server import ServerDiedError, serve
from bench.workloads import agent
from stateful_sglang.session.messages import Message

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 240.0
"""A second round is run only where both rounds fit in here."""
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Recording:
    """What was said in the first run of the stateful arm; the other runs say the same."""

    messages: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    failed_calls: int = 0


@dataclass
class ArmRun:
    """One run of one arm on a server of its own."""

    stateful: bool
    start_s: float
    turns: list[Turn] = field(default_factory=list)


def run_arm(stateful: bool, turns: int, recording: Recording) -> ArmRun:
    """Start a server, hold both agents' conversations on it, and stop it."""
    flags = [] if stateful else ["--stateful", "off", "--enable-cache-report"]
    demo_report.heading(stateful)
    with (
        serve(*flags) as server,
        httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S) as client,
    ):
        run = ArmRun(stateful, server.start_s)
        warm_up = {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        client.post("/generate", json=warm_up).raise_for_status()
        head = Head(agent.system_prompt(ROOT), agent.TOOLS, agent.examples())
        arm: Arm = StatefulArm(client, head) if stateful else StatelessArm(client, head)
        for number in range(1, turns + 1):
            for name in agent.TASKS:
                turn = take_turn(arm, name, number, turns, recording)
                run.turns.append(turn)
                demo_report.line(turn)
        arm.close()
    return run


def take_turn(arm: Arm, name: str, number: int, turns: int, recording: Recording) -> Turn:
    """Say what is recorded for this turn; record it first where nothing is."""
    key = (name, number)
    if key not in recording.messages:
        messages = []
        if number > 1:
            outcome = agent.run_tool(ROOT, recording.answers[name, number - 1])
            recording.failed_calls += outcome.failed
            messages.append(Message("tool", outcome.text))
        messages.append(Message("user", agent.tasks(name, turns)[number - 1]))
        recording.messages[key] = messages
    turn = arm.turn(name, number, recording.messages[key], recording.answers.get(key, ""))
    recording.answers.setdefault(key, turn.text)
    return turn


def run_demo(turns: int) -> tuple[list[ArmRun], Recording]:
    """Both arms, and both once more if that fits into `TIME_LIMIT_S`."""
    began = time.monotonic()
    recording = Recording()
    runs = [run_arm(stateful, turns, recording) for stateful in (True, False)]
    if 2 * (time.monotonic() - began) < TIME_LIMIT_S:
        runs += [run_arm(stateful, turns, recording) for stateful in (True, False)]
    return runs, recording


def keep_serving() -> None:
    """Serve until interrupted."""
    with contextlib.suppress(KeyboardInterrupt), serve() as server:
        print(f"\nserving at {server.url}, log in {server.log}; Ctrl-C ends it")
        print(f"  curl -s {server.url}/v1/sessions -d '{{}}'", flush=True)
        signal.pause()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of `scripts/demo`."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=6, help="turns of each agent (default: 6)")
    parser.add_argument("--json", type=Path, help="write turns and figures to this file")
    parser.add_argument("--keep-serving", action="store_true", help="leave a server running")
    args = parser.parse_args(argv)
    if not 1 <= args.turns <= agent.MAX_TURNS:
        parser.error(f"--turns is {args.turns}; expected 1 to {agent.MAX_TURNS}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 1 where a server did not start or broke off a turn."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    try:
        runs, recording = run_demo(args.turns)
    except (ServerDiedError, RuntimeError, httpx.HTTPError) as error:
        print(f"scripts/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    figures = demo_report.figures(
        [run.turns for run in runs if run.stateful],
        [run.turns for run in runs if not run.stateful],
    )
    figures |= {
        "failed_calls": recording.failed_calls,
        "install_s": round(float(os.environ.get("STATEFUL_SGLANG_INSTALL_S", 0)), 1),
        "run_s": round(time.monotonic() - began, 1),
    }
    demo_report.summary(runs, figures)
    if args.json:
        arms = [
            {
                "arm": "stateful" if run.stateful else "stateless",
                "start_s": round(run.start_s, 1),
                "turns": [asdict(turn) for turn in run.turns],
            }
            for run in runs
        ]
        args.json.write_text(json.dumps({"figures": figures, "arms": arms}, indent=1) + "\n")
        print(f"written to {args.json}")
    if args.keep_serving:
        keep_serving()
    return 0


if __name__ == "__main__":
    sys.exit(main())
