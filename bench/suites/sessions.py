"""What sessions cost: forks and rollbacks, tool results on the way, idle ones, and the journal.

fork: forks and rollbacks of a session of 100,000 tokens: time, memory of each process, and what is
computed by them and their next turns beyond what these append. ingest: the first text of an answer
to three results of tools that come one after the other, with each taken in as it comes, and with
all appended at the end, on the embedded model. idle: sessions that were imported and lie idle:
memory of each process, how long operations take beside them, and how long the first uses take after
a restart; and how long others wait while a session of 100,000 tokens is imported, exported, or
brought back. journal: turns and decoding of a server that records beside two that do not.

All but ingest are measured with a model of one layer and random weights, which takes so little time
that what sessions add can be seen.

    python -m bench sessions --json sessions.json
    python -m bench sessions --part idle --sessions 2000 --folder /where/the/journal/would/be
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness.figures import Figure, report
from bench.harness.options import Json, ServerArguments

PARTS = ("fork", "ingest", "idle", "journal")


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; may be repeated. All if none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1000, help="Of the session forked.")] = 100_000,
    forks: Annotated[int, typer.Option(min=1, help="And rollbacks.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Of each way to bring results.")] = 9,
    result_tokens: Annotated[int, typer.Option(min=8, help="Of a result, about.")] = 1000,
    arrivals: Annotated[
        str, typer.Option(help="Seconds from the calls to their results, with commas.")
    ] = "0,1,2",
    sessions: Annotated[int, typer.Option(min=1, help="That lie idle.")] = 10_000,
    idle_tokens: Annotated[int, typer.Option(min=1000, help="Of each of them.")] = 20_000,
    import_s: Annotated[float, typer.Option(help="Longest time to import them.")] = 3600.0,
    samples: Annotated[int, typer.Option(min=10, help="Of each time beside them.")] = 100,
    turns: Annotated[int, typer.Option(min=10, help="With and without a journal.")] = 200,
    decodes: Annotated[int, typer.Option(min=2, help="Long answers, likewise.")] = 12,
    folder: Annotated[
        Path | None, typer.Option(help="On the journal's disk; the temporary one's if none.")
    ] = None,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> None:
    """Measure and print; see the module's docstring."""
    from bench.suites import _fork, _idle, _ingest, _recorded

    more, after_s = server_arguments or [], _seconds(arrivals)
    runs: dict[str, Callable[[], tuple[dict[str, Figure], dict[str, Any]]]] = {
        "fork": lambda: _fork.run(tokens, forks, more),
        "ingest": lambda: _ingest.run(rounds, result_tokens, after_s, more),
        "idle": lambda: _idle.run(sessions, idle_tokens, samples, import_s, folder, more),
        "journal": lambda: _recorded.run(turns, decodes, 400, folder, more),
    }
    wanted = part or list(PARTS)
    unknown = set(wanted) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {PARTS}")
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {}
    for name in wanted:
        found, details[name] = runs[name]()
        figures |= found
    report(figures, json, **details)


def _seconds(text: str) -> list[float]:
    """Numbers of a list with commas between."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of seconds with commas between") from error


if __name__ == "__main__":
    typer.run(main)
