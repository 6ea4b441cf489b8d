"""Token exactness: greedy turns of random sessions against `transformers` from scratch.

Sessions of random deltas and lengths run interleaved on one float32 server, through the session
API with drafts on. Then every generated token is checked against a float32 `transformers` model
that reads the whole transcript at once: the token must be the argmax there. A difference is
excused only where the two logits lie closer than ``--tie``.

    python -m bench.suites.exactness --sessions 200 --json exactness.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.progress import track

from bench.harness.server import serve

MAX_TOKENS = 24
TIE = 1e-4
"""Logits closer than this are a tie."""
_WORDS = (
    '{"name": "search", "arguments": {"pattern": "def ", "path": "src/tree.py"}}',
    '{"name": "read", "arguments": {"path": "src/tree.py", "first": 1, "last": 40}}',
    "The result is below.",
    "Count the lines of every file and report the total.",
    "once upon a time there was a small engine that could",
    "<tool_response>42 lines</tool_response>",
)


@dataclass
class Session:
    """One random conversation and what the server did with it."""

    id: str
    turns_left: int
    transcript: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    """Positions in the transcript of tokens that the model generated."""
    turns: int = 0
    extra_computed: int = 0
    """Most prompt tokens a turn after the first computed beyond its delta."""


def random_delta(rng: random.Random, tokenizer, first: bool) -> list[int]:
    """Text that repeats itself, plain text, or random token ids: 1 to about 200 tokens."""
    kind = rng.random()
    if kind < 0.5:
        text = "\n".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 8 if first else 4)))
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if kind < 0.8:
        text = (
            f"<|im_end|>\n<|im_start|>user\n{rng.choice(_WORDS)}<|im_end|>\n<|im_start|>assistant\n"
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return [rng.randrange(20, tokenizer.vocab_size) for _ in range(rng.randint(1, 60))]


def run_turn(client: httpx.Client, session: Session, delta: list[int], max_tokens: int) -> Session:
    """Append a delta greedily and extend the local transcript by what came back."""
    reply = client.post(
        f"/v1/sessions/{session.id}/append",
        json={
            "input_ids": delta,
            "return_output_ids": True,
            "sampling": {"temperature": 0, "max_tokens": max_tokens},
        },
    )
    reply.raise_for_status()
    body = reply.json()
    usage = body["usage"]
    if session.transcript:
        extra = usage["computed_tokens"] - usage["delta_tokens"]
        session.extra_computed = max(session.extra_computed, extra)
    session.turns += 1
    session.transcript += delta
    start = len(session.transcript)
    session.transcript += body["output_ids"]
    session.generated += range(start, len(session.transcript))
    return session


def play(url: str, model: Path, sessions: int, seed: int) -> list[Session]:
    """Run all sessions' turns in a random interleaving, a few at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(seed)
    with (
        httpx.Client(base_url=url, timeout=300) as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        done, live = [], []
        waiting = sessions
        progress = iter(track(range(sessions), "sessions", transient=True))
        while live or waiting:
            while waiting and len(live) < 12:
                opened = client.post("/v1/sessions", json={}).raise_for_status().json()
                live.append(Session(opened["id"], rng.randint(2, 5)))
                waiting -= 1
            batch = rng.sample(live, min(len(live), rng.randint(1, 4)))
            turns = [
                pool.submit(
                    run_turn,
                    client,
                    session,
                    random_delta(rng, tokenizer, not session.transcript),
                    rng.randint(1, MAX_TOKENS),
                )
                for session in batch
            ]
            for turn in turns:
                session = turn.result()
                session.turns_left -= 1
                if not session.turns_left:
                    client.delete(f"/v1/sessions/{session.id}").raise_for_status()
                    live.remove(session)
                    done.append(session)
                    next(progress, None)
        return done


@dataclass(frozen=True)
class Mismatch:
    """A generated token that is not the reference's argmax."""

    session: str
    position: int
    gap: float
    """Logit of the reference's choice minus the logit of ours."""


def compare(model: Path, sessions: list[Session]) -> list[Mismatch]:
    """Check every generated token against `transformers` in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
    mismatches = []
    for session in track(sessions, "transformers", transient=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([session.transcript], device=device)).logits[0]
        for position in session.generated:
            row = logits[position - 1]
            ours = session.transcript[position]
            gap = float(row.max() - row[ours])
            if gap > 0:
                mismatches.append(Mismatch(session.id, position, gap))
    return mismatches


def main() -> int:
    """Run the check; exit status 1 when a mismatch is no tie."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tie", type=float, default=TIE, help="logits closer than this are a tie")
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="after --: more arguments of the server")
    args = parser.parse_args()

    from stateful_sglang.cpu.platform import prepare
    from stateful_sglang.embedded.cache import ensure_default_model

    prepare()
    model = ensure_default_model()
    began = time.monotonic()
    with serve("--model-path", str(model), "--dtype", "float32", *args.server) as server:
        sessions = play(server.url, model, args.sessions, args.seed)
    mismatches = compare(model, sessions)
    real = [m for m in mismatches if m.gap >= args.tie]
    figures = {
        "sessions": len(sessions),
        "turns": sum(s.turns for s in sessions),
        "tokens_generated": sum(len(s.generated) for s in sessions),
        "tokens_transcript": sum(len(s.transcript) for s in sessions),
        "mismatches": len(real),
        "ties": len(mismatches) - len(real),
        "computed_over_delta_max": max(s.extra_computed for s in sessions),
        "run_s": round(time.monotonic() - began, 1),
    }
    for name, value in figures.items():
        print(f"{name:28} {value}")
    for mismatch in real[:20]:
        print(f"MISMATCH {mismatch}")
    if args.json:
        args.json.write_text(json.dumps({"figures": figures}, indent=1))
    return 1 if real else 0


if __name__ == "__main__":
    raise SystemExit(main())
