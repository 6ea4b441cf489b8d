"""What history costs a turn: session appends against the whole conversation sent every time.

Both ways hold the same conversation on one server: user turns of about ``--delta`` tokens, short
answers. A session is appended each user turn; statelessly the full message list goes to
``/v1/chat/completions``, with SGLang's prefix cache warm, as agents do today. Turns alternate
between the ways, and are timed once the history has reached each length.

    python -m bench turns --histories 1000,4000,7000
    python -m bench turns --histories 10000,50000 -- --model-path DIR --load-format dummy
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.engines.dialogues import Dialogue, Manner, Reply, SessionDialogue, StatelessDialogue
from bench.harness import http
from bench.harness.figures import report
from bench.harness.options import Json, ServerArguments
from bench.harness.rounds import rotated, say
from bench.harness.server import serve
from bench.workloads.prompts import passage

ANSWER = "Done. The next step is to read the file and to run its tests again."
"""What the stateless way keeps as the model's answer, and a session as the model gave it."""


@dataclass
class Way:
    """One way to hold the conversation, and how its timed turns went, by history length."""

    name: str
    dialogue: Dialogue
    replies: dict[int, list[Reply]] = field(default_factory=dict)

    def say(self, number: int, tokens: int) -> Reply:
        """Take a turn of about that many tokens."""
        said = {"role": "user", "content": passage(number, tokens)}
        return self.dialogue.say([said], ANSWER)

    def ms(self, history: int) -> list[float]:
        """Of each timed turn at a history length."""
        return [reply.total_ms for reply in self.replies[history]]

    def sent(self, history: int) -> float:
        """Bytes of a turn's request, the median."""
        return statistics.median(reply.sent_bytes for reply in self.replies[history])


def run(
    client: httpx.Client, histories: list[int], turns: int, delta: int, max_tokens: int
) -> list[Way]:
    """Grow both conversations to each history length and time turns there, alternating."""
    manner = Manner(max_tokens)
    ways = [
        Way("session", SessionDialogue(client, manner)),
        Way("stateless", StatelessDialogue(client, manner)),
    ]
    number = 0
    for history in histories:
        for way in ways:
            prompt, step = 0, number
            while prompt < history:
                prompt = way.say(step, delta).prompt_tokens
                step += 1
        number = step
        for timed in range(turns):
            for way in rotated(ways, timed):
                way.replies.setdefault(history, []).append(way.say(number, delta))
            number += 1
        say(f"history of {history} tokens: done")
    return ways


def lengths(text: str) -> list[int]:
    """Ascending numbers of a list with commas between."""
    try:
        return sorted(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers with commas between") from error


def main(
    histories: Annotated[str, typer.Option(help="Tokens, with commas.")] = "1000,4000,7000",
    turns: Annotated[int, typer.Option(min=1, help="Timed turns at each history.")] = 7,
    delta: Annotated[int, typer.Option(min=8, help="Tokens of a user turn, about.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated a turn.")] = 1,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> None:
    """Measure and print; see the module's docstring."""
    wanted = lengths(histories)
    # What is stateless stays so: its requests would find a session of their own.
    arguments = ["--dropin", "off", *(server_arguments or ())]
    with serve(*arguments) as server, http.client(server.url) as client:
        session, stateless = run(client, wanted, turns, delta, max_tokens)
        info = client.get("/get_server_info").json()

    table = Table("history", "session, ms", "stateless, ms", "ratio", "sent, bytes", "sent, bytes")
    figures: dict[str, float] = {}
    for history in wanted:
        ours, theirs = session.ms(history), stateless.ms(history)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        figures[f"ratio_{history}"] = round(ratio, 3)
        figures[f"session_ms_{history}"] = round(statistics.median(ours), 2)
        figures[f"stateless_ms_{history}"] = round(statistics.median(theirs), 2)
        table.add_row(
            str(history),
            f"{statistics.median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})",
            f"{statistics.median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f})",
            f"{ratio:.2f}",
            f"{session.sent(history):.0f}",
            f"{stateless.sent(history):.0f}",
        )
    Console().print(table)
    report(
        figures,
        json,
        ms={way.name: {h: way.ms(h) for h in wanted} for way in (session, stateless)},
        server={key: info.get(key) for key in ("model_path", "device", "dtype", "version")},
    )
