"""The doctor's screen: a table on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys

from stateful_sglang.doctor.finding import Finding


def healthy(findings: list[Finding]) -> bool:
    """Whether a server would start."""
    return all(finding.verdict != "fail" for finding in findings)


def render(findings: list[Finding]) -> None:
    """Show the findings on standard output: a table on a terminal, plain lines otherwise."""
    if sys.stdout.isatty():
        try:
            _render_table(findings)
            return
        except ImportError:
            pass
    width = max(len(finding.name) for finding in findings)
    for row in findings:
        print(f"{row.verdict:<5} {row.name:<{width}}  {row.found}")
        if row.remedy:
            print(f"{'':<5} {'':<{width}}  -> {row.remedy}")
    print(_verdict(findings))


def _render_table(findings: list[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for row in findings:
        text = escape(row.found)
        if row.remedy:
            text += f"\n[{colours[row.verdict]}]→ {escape(row.remedy)}[/]"
        table.add_row(f"[{colours[row.verdict]}]{row.verdict}[/]", row.name, text)
    console = Console()
    console.print(table)
    console.print(f"[{'green' if healthy(findings) else 'bold red'}]{_verdict(findings)}[/]")


def _verdict(findings: list[Finding]) -> str:
    failures = [finding.name for finding in findings if finding.verdict == "fail"]
    return f"would fail: {', '.join(failures)}" if failures else "ready to serve"
