"""A coding agent's tool calls, held by the server as sessions and, for comparison, sent every time.

Two agents take turns on one system prompt and the same four tools, which run on the small
repository of the benches' corpus. The same conversation then goes statelessly to the same build
with `--stateful off`: the recorded messages and answers, greedy in both. The two ways run one
server at a time, and alternate once more where the time allows.

    scripts/demo [--turns N] [--json FILE] [--keep-serving]
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import typer

from bench.corpus import REPOSITORY
from bench.engines.dialogues import (
    Dialogue,
    Manner,
    Message,
    Opening,
    SessionDialogue,
    StatelessDialogue,
)
from bench.harness import demo_report, http
from bench.harness.demo_report import DemoRun, DemoTurn
from bench.harness.options import Json
from bench.harness.server import ServerDiedError, serve
from bench.workloads import agent, tools

TIME_LIMIT_S = 240.0
"""A second round is run only where both rounds fit in here."""
REQUEST_TIMEOUT_S = 300.0
MANNER = Manner(max_tokens=96, stream=True, call=True)


@dataclass
class Recording:
    """What was said in the first run of the sessions; the other runs say the same."""

    messages: dict[tuple[str, int], list[Message]] = field(default_factory=dict)
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    failed_calls: int = 0


def run_way(stateful: bool, turns: int, recording: Recording) -> DemoRun:
    """Start a server, hold both agents' conversations on it, and stop it."""
    flags = [] if stateful else ["--stateful", "off", "--enable-cache-report"]
    demo_report.heading(stateful)
    with (
        serve(*flags) as server,
        http.client(server.url, REQUEST_TIMEOUT_S) as client,
    ):
        run = DemoRun(stateful, server.start_s)
        warm_up = {"text": "Hello", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        client.post("/generate", json=warm_up).raise_for_status()
        opening = Opening(agent.system_prompt(REPOSITORY), agent.TOOLS, agent.examples())
        way = SessionDialogue if stateful else StatelessDialogue
        dialogues = {name: way(client, MANNER, opening) for name in agent.TASKS}
        for number in range(1, turns + 1):
            for name, dialogue in dialogues.items():
                turn = take_turn(dialogue, name, number, turns, recording)
                run.turns.append(turn)
                demo_report.line(turn)
        for dialogue in dialogues.values():
            dialogue.close()
    return run


def take_turn(
    dialogue: Dialogue, name: str, number: int, turns: int, recording: Recording
) -> DemoTurn:
    """Say what is recorded for this turn; record it first where nothing is."""
    key = (name, number)
    if key not in recording.messages:
        messages: list[Message] = []
        if number > 1:
            outcome = tools.run_tool(REPOSITORY, recording.answers[name, number - 1])
            recording.failed_calls += outcome.failed
            messages.append({"role": "tool", "content": outcome.text})
        task = agent.tasks(name, turns)[number - 1]
        messages.append({"role": "user", "content": task})
        recording.messages[key] = messages
    reply = dialogue.say(recording.messages[key], recording.answers.get(key, ""))
    recording.answers.setdefault(key, reply.text)
    return DemoTurn(name, number, **reply._asdict())


def run_demo(turns: int) -> tuple[list[DemoRun], Recording]:
    """Both ways, and both once more if that fits into `TIME_LIMIT_S`."""
    began = time.monotonic()
    recording = Recording()
    runs = [run_way(stateful, turns, recording) for stateful in (True, False)]
    if 2 * (time.monotonic() - began) < TIME_LIMIT_S:
        runs += [run_way(stateful, turns, recording) for stateful in (True, False)]
    return runs, recording


def serve_on() -> None:
    """Serve until interrupted."""
    with contextlib.suppress(KeyboardInterrupt), serve() as server:
        print(f"\nserving at {server.url}, log in {server.log}; Ctrl-C ends it")
        print(f"  curl -s {server.url}/v1/sessions -d '{{}}'", flush=True)
        signal.pause()


def main(
    turns: Annotated[int, typer.Option(min=1, max=agent.MAX_TURNS, help="Of each agent.")] = 6,
    json: Json = None,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave a server running.")
    ] = False,
) -> int:
    """Run the demo; the exit status is 1 where a server did not start or broke off a turn."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    try:
        runs, recording = run_demo(turns)
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
    if json:
        demo_report.write(json, runs, figures)
    if keep_serving:
        serve_on()
    return 0
