"""Part of the bench of sessions: what the journal costs a turn and the decoding, and its bytes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import corpus
from bench.engines import random_model
from bench.engines.operations import Operations, Turn
from bench.harness import http
from bench.harness.figures import Figure
from bench.harness.rounds import rotated, say
from bench.harness.server import serve
from bench.harness.spread import milliseconds
from bench.harness.stats import paired_interval
from bench.suites.journal import plain_syncs

_ROOM = 65_536
_TURNS_EACH = 40
"""Turns of a session, before the next one is taken."""
WAYS = ("off", "full", "control")
"""Without a file; with each turn on the disk before it is answered; and once more without, which
tells by how much two servers differ that are alike."""


def run(
    turns: int, decodes: int, decoded: int, folder: Path | None, more: list[str]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Take turns on three servers in alternation, one that records and two that do not.

    Args:
        turns: Short ones, on each server.
        decodes: Long answers, on each.
        decoded: Tokens of one of those.
        folder: For the journal; the temporary one's if none.
        more: Arguments of the launcher.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place, ExitStack() as running:
        model = random_model.save(Path(place) / "model", _ROOM)
        journal = Path(place) / "journal.sqlite3"
        served: dict[str, Operations] = {}
        for way, file in zip(WAYS, ("off", str(journal), "off"), strict=True):
            arguments = (*random_model.arguments(model, _ROOM, _ROOM), "--journal", file)
            server = running.enter_context(serve(*arguments, "--journal-sync", "full", *more))
            served[way] = Operations(running.enter_context(http.client(server.url)))
        took, syncs = _turns(served, turns, Path(place))
        rates = _rates(served, decodes, decoded)
        running.close()
        bytes_a_token = journal.stat().st_size / sum(
            turn.usage["delta_tokens"] + turn.usage["generated_tokens"] for turn in took["full"]
        )
    seconds = {way: [turn.total_s for turn in took[way]] for way in WAYS}
    added = [
        full - (off + control) / 2
        for off, full, control in zip(*(seconds[way] for way in WAYS), strict=True)
    ]  # of the same turn on all servers, one after the other
    without = [
        (off + control) / 2 for off, control in zip(rates["off"], rates["control"], strict=True)
    ]
    figures: dict[str, Figure] = {
        **milliseconds("one_sync_ms", syncs),
        **{
            name: value
            for way in WAYS
            for name, value in milliseconds(f"turn_ms_{way}", seconds[way]).items()
        },
        **milliseconds("journal_adds_ms", added),
        **{f"decode_tokens_s_{way}": _median(rates[way]) for way in WAYS},
        **_slowdown("decode_slowdown", without, rates["full"]),
        **_slowdown("decode_slowdown_of_control", rates["off"], rates["control"]),
        "journal_bytes_a_token_random": round(bytes_a_token, 2),
    }
    figures["journal_adds_beyond_sync_ms_p50"] = round(
        float(figures["journal_adds_ms_p50"] or 0) - float(figures["one_sync_ms_p50"] or 0), 3
    )
    return figures, {"rates": rates}


def _slowdown(name: str, before: list[float], after: list[float]) -> dict[str, Figure]:
    """How many times the rates were lower, paired by round, with a 95 % interval."""
    found = paired_interval(dict(enumerate(before)), dict(enumerate(after)))
    assert found is not None
    bounds = {f"{name}_low": round(found.low, 4), f"{name}_high": round(found.high, 4)}
    return {name: round(found.ratio, 4), **bounds}


def _median(rates: list[float]) -> float:
    return round(statistics.median(rates), 1)


def _turns(
    served: dict[str, Operations], turns: int, folder: Path
) -> tuple[dict[str, list[Turn]], list[float]]:
    """The same turns on all servers, some 100 tokens of code in and one out.

    Returns:
        The turns, and the seconds that a page takes to be written and synced between them, where a
        disk and its processor have had the same time to fall asleep.
    """
    took: dict[str, list[Turn]] = {way: [] for way in served}
    syncs: list[float] = []
    for number, text in zip(range(-8, turns), _texts(), strict=False):
        if number == -8 or number % _TURNS_EACH == 0:
            ids = {way: one.open().reply["id"] for way, one in served.items()}
        for way in rotated(list(served), number):
            said = [{"role": "user", "content": text}]
            turn = served[way].append(ids[way], 1, messages=said)
            if number >= 0:  # the first are to warm up
                took[way].append(turn)
        time.sleep(statistics.median([turn.total_s for turn in took["full"]] or [0.02]))
        syncs += plain_syncs(folder, 1)
    say(f"{turns} turns with and without a journal")
    return took, syncs


def _texts() -> Iterator[str]:
    pieces = corpus.excerpts(24)
    while True:
        yield from pieces


def _rates(served: dict[str, Operations], decodes: int, decoded: int) -> dict[str, list[float]]:
    """Tokens a second of long answers, from their first text on."""
    rates: dict[str, list[float]] = {way: [] for way in served}
    for number in range(-1, decodes):
        for way in rotated(list(served), number):
            opened = served[way].open().reply["id"]
            turn = served[way].append(opened, decoded, text="def search(pattern, path):")
            served[way].close(opened)
            if number >= 0:
                generated = turn.usage["generated_tokens"]
                rates[way].append((generated - 1) / (turn.total_s - turn.ttft_s))
    say(f"{decodes} long answers with and without a journal")
    return rates
