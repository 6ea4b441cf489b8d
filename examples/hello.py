"""Two turns of one session: the second computes what is new, not what was said before."""

from __future__ import annotations

import sys

from stateful_sglang.client import Client


def main(url: str) -> None:
    with Client(url) as client, client.open(system="You are terse.") as session:
        for question in ("What is the capital of France?", "And of Italy?"):
            turn = session.append(question, sampling={"temperature": 0, "max_tokens": 32})
            print(f"{question} {turn.text.strip()}")
            usage = turn.usage
            print(f"  {usage.history_tokens} tokens before, {usage.computed_tokens} computed")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")
