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
WAYS = ("full", "off")
"""With each turn on the disk before it is answered, and without a file."""


def run(
    turns: int, decodes: int, decoded: int, folder: Path | None, more: list[str]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Take turns on two servers in alternation, one that records and one that does not.

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
        for way, file in zip(WAYS, (str(journal), "off"), strict=True):
            arguments = (*random_model.arguments(model, _ROOM, _ROOM), "--journal", file)
            server = running.enter_context(serve(*arguments, "--journal-sync", "full", *more))
            served[way] = Operations(running.enter_context(http.client(server.url)))
        took, syncs = _turns(served, turns, Path(place))
        rates = _rates(served, decodes, decoded)
        running.close()
        bytes_a_token = journal.stat().st_size / sum(
            turn.usage["delta_tokens"] + turn.usage["generated_tokens"] for turn in took["full"]
        )
    added = [
        a.total_s - b.total_s for a, b in zip(took["full"], took["off"], strict=True)
    ]  # of the same turn on both servers, one after the other
    slower = paired_interval(dict(enumerate(rates["off"])), dict(enumerate(rates["full"])))
    assert slower is not None
    figures: dict[str, Figure] = {
        **milliseconds("one_sync_ms", syncs),
        **milliseconds("turn_ms_full", [turn.total_s for turn in took["full"]]),
        **milliseconds("turn_ms_off", [turn.total_s for turn in took["off"]]),
        **milliseconds("journal_adds_ms", added),
        **{f"decode_tokens_s_{way}": _median(rates[way]) for way in WAYS},
        "decode_slowdown": round(slower.ratio, 4),
        "decode_slowdown_low": round(slower.low, 4),
        "decode_slowdown_high": round(slower.high, 4),
        "journal_bytes_a_token_random": round(bytes_a_token, 2),
    }
    figures["journal_adds_beyond_sync_ms_p50"] = round(
        float(figures["journal_adds_ms_p50"] or 0) - float(figures["one_sync_ms_p50"] or 0), 3
    )
    return figures, {"rates": rates}


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
