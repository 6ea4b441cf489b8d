"""The doctor's screen: coloured rows on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from stateful_sglang.doctor.finding import Finding

_NAME_WIDTH = len("stateful_sglang")
"""Of the longest name: rows are shown before all are known."""


def healthy(findings: list[Finding]) -> bool:
    """Whether a server would start."""
    return all(finding.verdict != "fail" for finding in findings)


def render(findings: Iterable[Finding]) -> list[Finding]:
    """Show each finding as it comes, in colour on a terminal, and return what was shown."""
    show = _coloured() if sys.stdout.isatty() else _plain
    shown = []
    for row in findings:
        show(row)
        shown.append(row)
    print(_verdict(shown))
    return shown


def _plain(row: Finding) -> None:
    print(f"{row.verdict:<5} {row.name:<{_NAME_WIDTH}}  {row.found}", flush=True)
    if row.remedy:
        print(f"{'':<5} {'':<{_NAME_WIDTH}}  -> {row.remedy}", flush=True)


def _coloured() -> Callable[[Finding], None]:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return _plain
    console = Console()
    colours = {"ok": "green", "note": "yellow", "fail": "bold red"}

    def show(row: Finding) -> None:
        text = escape(row.found)
        if row.remedy:
            text += f"\n[{colours[row.verdict]}]→ {escape(row.remedy)}[/]"
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=4)
        grid.add_column(width=_NAME_WIDTH)
        grid.add_row(f"[{colours[row.verdict]}]{row.verdict}[/]", row.name, text)
        console.print(grid)

    return show


def _verdict(findings: list[Finding]) -> str:
    failures = [finding.name for finding in findings if finding.verdict == "fail"]
    return f"would fail: {', '.join(failures)}" if failures else "ready to serve"
