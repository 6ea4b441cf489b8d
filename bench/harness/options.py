"""Command-line options that several benches have, each declared once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures, and what they come from."),
]
Rounds = Annotated[
    int | None,
    typer.Option("--rounds", min=1, help="Times that every arm has its turn."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes, a few minutes.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Of the prompts; by default new ones every run.")
]
Lock = Annotated[Path, typer.Option("--lock", help="Held while anything is measured.")]
DEFAULT_LOCK = Path(tempfile.gettempdir()) / "stateful-sglang-bench.lock"
PEERS = Path(__file__).resolve().parents[2] / ".peers"
"""Where scripts/peers puts the engines that ours is compared with."""
ServerArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- ARGUMENT...]", help="More arguments of the launcher.", show_default=False
    ),
]
