"""What recording a turn costs: bytes a token, and its latency beside one sync of the same disk.

Turns of 1,600 characters of source code are recorded by 1, 8 and 64 sessions at once, with either
--journal-sync. The disk's own figure is a page written and synced to a file of its own, before and
after.

    python -m bench journal --json journal.json --folder /where/the/journal/would/be
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench import corpus
from bench.engines.recorder import Sync, write
from bench.harness.figures import Figure, report
from bench.harness.options import Json
from bench.harness.rounds import say
from bench.harness.spread import milliseconds

WRITERS = (1, 8, 64)
TEXTS, CHARACTERS = 12, 1600
_SYNCS = 200


def main(
    turns: Annotated[int, typer.Option(min=1, help="Recorded by each session.")] = 50,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to be measured; the temporary one's if none.")
    ] = None,
    json: Json = None,
) -> None:
    """Measure and print."""
    texts = corpus.excerpts(TEXTS, CHARACTERS)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        syncs = plain_syncs(Path(place))
        for sync in get_args(Sync):
            for writers in WRITERS:
                done = write(
                    Path(place) / f"{sync}-{writers}.sqlite3",
                    texts,
                    writers=writers,
                    turns=turns,
                    sync=sync,
                )
                name = f"{sync}_{writers}"
                figures |= milliseconds(f"{name}_ms", done.latencies)
                figures[f"{name}_turns_a_transaction"] = round(
                    (len(done.latencies) + writers) / done.transactions, 2
                )
                say(f"{sync}, {writers} writers: {len(done.latencies)} turns")
        figures["bytes_a_token"] = round(done.bytes / done.tokens, 2)
        figures["tokens_a_turn"] = round(done.tokens / len(done.latencies), 1)
        figures["load_ms"] = round(done.load_s * 1e3, 3)
        syncs += plain_syncs(Path(place))
    report({**milliseconds("one_sync_ms", syncs), **figures}, json)


def plain_syncs(folder: Path, times: int = _SYNCS) -> list[float]:
    """Seconds that a page takes to be appended to a file and synced, each of some times."""
    taken = []
    with (folder / "plain").open("wb", buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return taken
