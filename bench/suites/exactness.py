"""Token exactness: greedy turns of random sessions against `transformers` from scratch.

Sessions of random deltas and lengths run interleaved on one float32 server, through the session
API with drafts on. Then every generated token is checked against a float32 `transformers` model
that reads the whole transcript at once: the token must be the argmax there. A difference is
excused only where the two logits lie closer than ``--tie``.

    python -m bench exactness --sessions 200 --json exactness.json
"""

from __future__ import annotations

import concurrent.futures
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import typer

from bench.engines import package
from bench.harness import http
from bench.harness.figures import report
from bench.harness.options import Json, ServerArguments
from bench.harness.rounds import progress
from bench.harness.server import serve
from bench.workloads.prompts import random_delta

MAX_TOKENS = 24


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
        http.client(url) as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        done: list[Session] = []
        live: list[Session] = []
        waiting = sessions
        bar = progress(range(sessions), "sessions")
        next(bar, None)
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
                    next(bar, None)
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
    for session in progress(sessions, "transformers"):
        with torch.inference_mode():
            logits = reference(torch.tensor([session.transcript], device=device)).logits[0]
        for position in session.generated:
            row = logits[position - 1]
            ours = session.transcript[position]
            gap = float(row.max() - row[ours])
            if gap > 0:
                mismatches.append(Mismatch(session.id, position, gap))
    return mismatches


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Random conversations.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 1,
    tie: Annotated[float, typer.Option(help="Logits closer than this are a tie.")] = 1e-4,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Run the check; exit status 1 when a mismatch is no tie."""
    package.prepare()
    model = package.default_model()
    began = time.monotonic()
    arguments = ("--model-path", str(model), "--dtype", "float32", *(server_arguments or ()))
    with serve(*arguments) as server:
        played = play(server.url, model, sessions, seed)
    mismatches = compare(model, played)
    real = [m for m in mismatches if m.gap >= tie]
    figures = {
        "sessions": len(played),
        "turns": sum(s.turns for s in played),
        "tokens_generated": sum(len(s.generated) for s in played),
        "tokens_transcript": sum(len(s.transcript) for s in played),
        "mismatches": len(real),
        "ties": len(mismatches) - len(real),
        "computed_over_delta_max": max(s.extra_computed for s in played),
        "run_s": round(time.monotonic() - began, 1),
    }
    report(figures, json)
    for mismatch in real[:20]:
        print(f"MISMATCH {mismatch}")
    return 1 if real else 0
