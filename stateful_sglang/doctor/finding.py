"""One row of the doctor's screen, and how versions are looked up."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

REQUIREMENTS = Path(__file__).parent.with_name("requirements")
INSTALL = "run scripts/install"

Verdict = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's screen."""

    name: str
    verdict: Verdict
    """note: works, but a person may want to know."""
    found: str
    remedy: str = ""


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
