"""What history costs a turn: session appends against the whole conversation sent every time.

Both arms hold the same conversation on one server: user turns of about ``--delta`` tokens, short
answers. The session arm appends each user turn; the stateless arm posts the full message list to
``/v1/chat/completions``, with SGLang's prefix cache warm, as agents do today. Turns alternate
between the arms, and are timed once the history has reached each length.

    python -m bench.suites.turns --histories 1000,4000,7000
    python -m bench.suites.turns --histories 10000,50000 -- --model-path DIR --load-format dummy
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.harness.server import serve

_ANSWER = "Done. The next step is to read the file and to run its tests again."
_TEXT = "the parser reads a token and the tree keeps its node while an agent waits for its tool"
_WORDS = _TEXT.split()


def passage(number: int, tokens: int) -> str:
    """About ``tokens`` tokens of text that is different for every number."""
    words = [_WORDS[(i * (number + 3) + i // 7) % len(_WORDS)] for i in range(tokens - 4)]
    return f"Step {number}: " + " ".join(words)


@dataclass
class Arm:
    """One way to hold the conversation, and how long its timed turns took."""

    name: str
    ms: dict[int, list[float]] = field(default_factory=dict)
    """By history length asked for."""
    request_bytes: dict[int, list[int]] = field(default_factory=dict)


class SessionArm(Arm):
    """Appends to a session."""

    def start(self, client: httpx.Client) -> None:
        self.client = client
        self.id = client.post("/v1/sessions", json={}).raise_for_status().json()["id"]

    def turn(self, text: str, max_tokens: int) -> tuple[int, int]:
        """Take a turn; returns the tokens of its prompt and the bytes sent."""
        reply = self.client.post(
            f"/v1/sessions/{self.id}/append",
            json={
                "messages": [{"role": "user", "content": text}],
                "sampling": {"max_tokens": max_tokens, "temperature": 0},
            },
        ).raise_for_status()
        usage = reply.json()["usage"]
        return usage["history_tokens"] + usage["delta_tokens"], len(reply.request.content)


class StatelessArm(Arm):
    """Sends everything, every time."""

    def start(self, client: httpx.Client) -> None:
        self.client = client
        self.messages: list[dict[str, str]] = []

    def turn(self, text: str, max_tokens: int) -> tuple[int, int]:
        """Take a turn; returns the tokens of its prompt and the bytes sent."""
        self.messages.append({"role": "user", "content": text})
        reply = self.client.post(
            "/v1/chat/completions",
            json={
                "model": "default",
                "messages": self.messages,
                "max_tokens": max_tokens,
                "temperature": 0,
            },
        ).raise_for_status()
        self.messages.append({"role": "assistant", "content": _ANSWER})
        return reply.json()["usage"]["prompt_tokens"], len(reply.request.content)


def run(client: httpx.Client, histories: list[int], args: argparse.Namespace) -> list[Arm]:
    """Grow both conversations to each history length and time turns there, arms alternating."""
    arms = [SessionArm("session"), StatelessArm("stateless")]
    number = 0
    for arm in arms:
        arm.start(client)
    for history in histories:
        for arm in arms:
            prompt, step = 0, number
            while prompt < history:
                prompt, _ = arm.turn(passage(step, args.delta), 1)
                step += 1
        number = step
        for timed in range(args.turns):
            for arm in arms if timed % 2 == 0 else reversed(arms):
                began = time.perf_counter()
                _, sent = arm.turn(passage(number, args.delta), args.max_tokens)
                arm.ms.setdefault(history, []).append(1e3 * (time.perf_counter() - began))
                arm.request_bytes.setdefault(history, []).append(sent)
            number += 1
    return arms


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--histories", default="1000,4000,7000", help="tokens, ascending")
    parser.add_argument("--turns", type=int, default=7, help="timed turns at each history")
    parser.add_argument("--delta", type=int, default=200, help="tokens of a user turn, about")
    parser.add_argument("--max-tokens", type=int, default=1, help="generated a timed turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="after --: arguments of the server")
    args = parser.parse_args()
    histories = sorted(int(part) for part in args.histories.split(","))

    with serve(*args.server) as server, httpx.Client(base_url=server.url, timeout=600) as client:
        session, stateless = run(client, histories, args)
        info = client.get("/get_server_info").json()

    table = Table("history", "session, ms", "stateless, ms", "ratio", "sent, bytes", "sent, bytes")
    figures: dict[str, float] = {}
    for history in histories:
        ours, theirs = session.ms[history], stateless.ms[history]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        figures[f"ratio_{history}"] = round(ratio, 3)
        figures[f"session_ms_{history}"] = round(statistics.median(ours), 2)
        figures[f"stateless_ms_{history}"] = round(statistics.median(theirs), 2)
        table.add_row(
            str(history),
            f"{statistics.median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})",
            f"{statistics.median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f})",
            f"{ratio:.2f}",
            f"{statistics.median(session.request_bytes[history]):.0f}",
            f"{statistics.median(stateless.request_bytes[history]):.0f}",
        )
    Console().print(table)
    print(json.dumps(figures))
    if args.json:
        result = {
            "figures": figures,
            "ms": {arm.name: arm.ms for arm in (session, stateless)},
            "server": {key: info.get(key) for key in ("model_path", "device", "dtype", "version")},
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
