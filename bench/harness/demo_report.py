"""What the demo shows: a line a turn, both ways side by side, and the figures."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_COLUMNS = "agent turn history  delta computed  TTFT ms total ms tokens/s accepted/step  answer"


@dataclass(frozen=True)
class DemoTurn:
    """One turn of an agent as its client saw it."""

    agent: str
    number: int
    """From 1."""
    history_tokens: int
    delta_tokens: int
    computed_tokens: int
    """Prompt tokens that the model had to compute."""
    generated_tokens: int
    ttft_ms: float
    total_ms: float
    accepted_per_step: float | None
    """Tokens that a decode step brought; None where the server does not say."""
    sent_bytes: int
    text: str

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens a second after the first text; None where all came at once."""
        seconds = (self.total_ms - self.ttft_ms) / 1e3
        return (self.generated_tokens - 1) / seconds if seconds > 1e-3 else None


@dataclass
class DemoRun:
    """One run of one way on a server of its own."""

    stateful: bool
    start_s: float
    turns: list[DemoTurn] = field(default_factory=list)


def heading(stateful: bool) -> None:
    """Announce a way."""
    name = "sessions on the server" if stateful else "stateless: everything, every time"
    print(f"\n== {name}{'' if stateful else ' (--stateful off)'}\n{_COLUMNS}", flush=True)


def line(turn: DemoTurn) -> None:
    """One turn, as soon as it is over."""
    rate = f"{turn.tokens_per_s:.1f}" if turn.tokens_per_s else "-"
    accepted = f"{turn.accepted_per_step:.2f}" if turn.accepted_per_step else "-"
    answer = " ".join(turn.text.split())
    room = 60
    print(
        f"{turn.agent:>5} {turn.number:>4} {turn.history_tokens:>7} {turn.delta_tokens:>6}"
        f" {turn.computed_tokens:>8} {turn.ttft_ms:>8.0f} {turn.total_ms:>8.0f} {rate:>8}"
        f" {accepted:>13}  {answer if len(answer) <= room else answer[: room - 3] + '...'}",
        flush=True,
    )


def figures(
    stateful: Sequence[Sequence[DemoTurn]], stateless: Sequence[Sequence[DemoTurn]]
) -> dict[str, float]:
    """The demo's numbers by name.

    Args:
        stateful: Turns of every run with sessions; runs have the same turns in the same order.
        stateless: The same of the runs without.
    """
    ours, theirs = _medians(stateful), _medians(stateless)
    ratios = {key: theirs[key] / ours[key] for key in ours}
    first = [ratio for (_, number), ratio in ratios.items() if number == 1]
    later = [t for turns in stateful for t in turns if t.number > 1]
    result = {
        "turn_ratio_median": round(statistics.median(ratios.values()), 3),
        "first_call_ratio": round(statistics.median(first), 3),
        "turn_ms_stateful": round(statistics.median(ours.values()), 1),
        "turn_ms_stateless": round(statistics.median(theirs.values()), 1),
        "rounds": len(stateful),
        "turns": len(ours),
        "answers_differing": _differing(stateful, stateless),
        "prompts_differing": sum(
            a.history_tokens + a.delta_tokens != b.history_tokens + b.delta_tokens
            for a, b in zip(stateful[0], stateless[0], strict=True)
        ),
    }
    if later:
        result["computed_over_delta_max"] = max(t.computed_tokens - t.delta_tokens for t in later)
    return result


def summary(runs: Sequence[DemoRun], numbers: dict[str, float]) -> None:
    """Both ways side by side, turn by turn, and what it comes to."""
    ours = _medians([run.turns for run in runs if run.stateful])
    theirs = _medians([run.turns for run in runs if not run.stateful])
    turns = {(t.agent, t.number): t for t in runs[0].turns}
    rows = [
        (
            f"{agent} {number}",
            str(turns[agent, number].history_tokens),
            str(turns[agent, number].delta_tokens),
            f"{ours[agent, number]:.0f}",
            f"{theirs[agent, number]:.0f}",
            f"{theirs[agent, number] / ours[agent, number]:.2f}x",
        )
        for agent, number in sorted(ours)
    ]
    last = (
        "median",
        "",
        "",
        f"{numbers['turn_ms_stateful']:.0f}",
        f"{numbers['turn_ms_stateless']:.0f}",
        f"{numbers['turn_ratio_median']:.2f}x",
    )
    _table(("turn", "history", "delta", "session, ms", "stateless, ms", "ratio"), [*rows, last])
    print(
        f"A turn takes 1/{numbers['turn_ratio_median']:.2f} of the time (median of the turns' "
        f"ratios, {numbers['rounds']} round(s)), the first of a session "
        f"1/{numbers['first_call_ratio']:.2f}."
    )
    if "computed_over_delta_max" in numbers:
        print(
            "Beyond its delta, a later turn of a session computed at most "
            f"{numbers['computed_over_delta_max']} tokens."
        )
    print(
        f"Answers differing between the two: {numbers['answers_differing']} of "
        f"{numbers['turns'] * numbers['rounds']}; prompts of another length: "
        f"{numbers['prompts_differing']} of {numbers['turns']}; calls that a tool refused: "
        f"{numbers['failed_calls']}. Set-up {numbers['install_s']:.0f} s, demo "
        f"{numbers['run_s']:.0f} s.",
        flush=True,
    )


def write(file: Path, runs: Sequence[DemoRun], numbers: dict[str, float]) -> None:
    """Write the figures, with every turn beside them."""
    arms = [
        {
            "arm": "stateful" if run.stateful else "stateless",
            "start_s": round(run.start_s, 1),
            "turns": [asdict(turn) for turn in run.turns],
        }
        for run in runs
    ]
    file.write_text(json.dumps({"figures": numbers, "arms": arms}, indent=1) + "\n")
    print(f"written to {file}")


def _medians(runs: Sequence[Sequence[DemoTurn]]) -> dict[tuple[str, int], float]:
    """Median milliseconds of each turn over a way's runs."""
    times: dict[tuple[str, int], list[float]] = {}
    for turns in runs:
        for turn in turns:
            times.setdefault((turn.agent, turn.number), []).append(turn.total_ms)
    return {key: statistics.median(values) for key, values in times.items()}


def _differing(
    stateful: Sequence[Sequence[DemoTurn]], stateless: Sequence[Sequence[DemoTurn]]
) -> int:
    """Turns whose answer is another one in the other way's run of the same round."""
    return sum(
        a.text != b.text
        for ours, theirs in zip(stateful, stateless, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print()
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for number, row in enumerate(rows):
            table.add_row(*row, end_section=number == len(rows) - 2)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()
